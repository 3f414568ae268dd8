"""Model card of a captioner, an adapter or a pretrained Q-Former.

A run writes its card and the facts from which the card is rendered (`card.json`). Publishing renders the card again,
because the repository and its licences are known only then. Text from data and names is escaped, so that it cannot
become markup.
"""

import contextlib
import hashlib
import html
import json
import math
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers.utils import CONFIG_NAME
from yaml import YAMLError

from .layout import pictures_of

FACTS_NAME = "card.json"
PEFT_PLACEHOLDER = "[More Information Needed]"  # text of the empty card that peft writes
TASKS = {  # type and name of the task, of captioners and pretrained Q-Formers, of images and features
    (False, False): ("image-text-to-text", "Image captioning"),
    (False, True): ("other", "Captioning of features"),
    (True, False): ("other", "Image-text retrieval"),
    (True, True): ("other", "Retrieval of features by text"),
}
PROTOCOL = ("prompt", "num_beams", "max_new_tokens", "tokenizer", "images", "references", "references_sha256")

# ----------------------------------------------------------------------------------------------------------------------
# Text of the card
# ----------------------------------------------------------------------------------------------------------------------


class Markdown(str):
    """Text that is Markdown already and is not escaped."""


def single_line(text: object) -> str:
    """Replace line breaks and control characters with single spaces."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def escape(text: object) -> str:
    r"""Escape Markdown, HTML and table separators in a text.

    Example:

    ```python
    >>> print(escape("a_b | <b>"))
    a\_b \| &lt;b&gt;
    ```
    """
    if isinstance(text, Markdown):
        return text
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", html.escape(single_line(text), quote=False))


def format_number(value: float | None, form: str = "{:,}") -> Markdown:
    """Format a number with a `str.format` or `%` pattern; `None` becomes an empty cell."""
    if value is None:
        return Markdown("")
    return Markdown(form % value if "%" in form else form.format(value))


def card_template(name: str) -> jinja2.Template:
    """Load a template of this folder. Each expression is escaped, unless a filter returns [`Markdown`]."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["url"] = lambda name: Markdown(quote(name))
    environment.filters["number"] = format_number
    environment.filters["code"] = lambda name: Markdown(re.sub(r"[^\w./-]", "_", name))
    return environment.get_template(name)


def render_card(facts: dict[str, Any], pictures: tuple[str, ...] = ()) -> str:
    """Render the text of a card.

    Args:
        facts: facts of a run (`training/run_facts.py`) or of a folder ([`describe_folder`]).
        pictures: names of the `PICTURES` in the folder of the card.
    """
    is_pretrained = facts.get("objective") == "pretrain"
    text = card_template("pretraining_card_template.md" if is_pretrained else "model_card_template.md").render(
        metadata=Markdown(card_metadata(facts).to_yaml()),
        title=single_line(facts["model"].split("/")[-1]),
        facts=facts,
        pictures=pictures,
    )
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", text)))


# ----------------------------------------------------------------------------------------------------------------------
# Metadata of the card
# ----------------------------------------------------------------------------------------------------------------------


def card_metadata(facts: dict[str, Any]) -> ModelCardData:
    """Return the metadata of the card, which the Hub uses to index the model."""
    is_adapter = bool(facts.get("adapter"))
    base_models, relation = _base_models(facts)
    reads_features, is_pretrained = bool(facts.get("feature_width")), facts.get("objective") == "pretrain"
    topic = "image-text-retrieval" if is_pretrained else "image-captioning"
    pipeline_tag = None if is_pretrained else "image-text-to-text"
    task = TASKS[is_pretrained, reads_features]
    results = [_eval_result(facts["evaluation"], score, task) for score in facts.get("scores") or []]
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=None if reads_features else pipeline_tag,
        base_model=base_models or None,
        base_model_relation=relation if base_models else None,
        datasets=sorted({dataset["name"] for dataset in facts.get("data", []) if dataset["on_hub"]}) or None,
        tags=[*([] if reads_features else [topic]), "q-former", "qformer-captioner", *(["lora"] if is_adapter else [])],
        model_name=single_line(facts["model"].split("/")[-1]) if results else None,
        eval_results=results or None,
    )
    licenses = _licenses(facts)
    data["license"] = licenses[0] if len(licenses) == 1 else licenses or None
    return data


def _base_models(facts: dict[str, Any]) -> tuple[list[str], str | None]:
    """Return the Hub ids of the base models, and the Hub's name for the relation to them."""
    if adapter := facts.get("adapter"):
        return [adapter["base"]] if adapter["base_is_on_hub"] else [], "adapter"
    if facts.get("starts_from"):
        return [facts["starts_from"]], "finetune"
    return [part["source"] for part in facts["parts"] if part["on_hub"]], None


def _licenses(facts: dict[str, Any]) -> list[str]:
    """Return the licence of the repository, otherwise those of the backbones, or an empty list if one is unknown."""
    licenses = facts.get("licenses", {})
    if own_license := licenses.get(facts["model"]):
        return [own_license]
    has_local_part = any(part["source"] and not part["on_hub"] for part in facts["parts"])
    return [] if has_local_part or None in licenses.values() else sorted(set(licenses.values()))


def _eval_result(evaluation: dict[str, Any], score: dict[str, Any], task: tuple[str, str]) -> EvalResult:
    """Return a score as an entry of the Hub's `model-index`, with the protocol of the evaluation."""
    name, on_hub = evaluation["name"], evaluation["on_hub"]
    protocol = {key: evaluation[key] for key in PROTOCOL if key in evaluation}  # scores of scenes have no tokenizer
    return EvalResult(
        task_type=task[0],
        task_name=task[1],
        dataset_type=name if on_hub else re.sub(r"\W+", "-", name),
        dataset_name=single_line(name),
        dataset_split=single_line(evaluation["split"]),
        dataset_revision=evaluation["revision"] if on_hub else None,
        dataset_args={key: single_line(value) if isinstance(value, str) else value for key, value in protocol.items()},
        metric_type=score["type"],
        metric_name=score["name"],
        metric_value=round(score["value"], 2),
    )


# ----------------------------------------------------------------------------------------------------------------------
# Cards in folders and repositories
# ----------------------------------------------------------------------------------------------------------------------


def write_card(folder: str | os.PathLike, facts: dict[str, Any]) -> None:
    """Write a card and its facts (`card.json`) to a folder.

    Args:
        folder: folder of the captioner or adapter.
        facts: facts of a run (`training/run_facts.py`).
    """
    folder = Path(folder)
    text = render_card(facts, pictures_of(folder))
    facts = {**facts, "sha256": text_sha256(text)}
    (folder / REPOCARD_NAME).write_text(text, encoding="utf-8")
    (folder / FACTS_NAME).write_text(json.dumps(facts, indent=2, default=str) + "\n")


def card_for_hub(
    folder: Path,
    repo_id: str,
    base_id: str | None = None,
    license: str | None = None,
    adapter_id: str | None = None,
) -> str:
    """Return the card of a folder for its repository. A card that the user wrote or edited is kept.

    Args:
        folder: folder of the captioner or adapter.
        repo_id: repository that the usage example loads.
        base_id: Hub id of the captioner that an adapter belongs to.
        license: licence of the repository, by default those of the backbones if the cards of all of them state it.
        adapter_id: Hub id of the adapter, if this captioner is its base.
    """
    facts = json.loads((folder / FACTS_NAME).read_text()) if (folder / FACTS_NAME).is_file() else None
    if (folder / REPOCARD_NAME).is_file():
        text = (folder / REPOCARD_NAME).read_text(encoding="utf-8", errors="replace")
        is_changed = facts is None or facts["sha256"] != text_sha256(text)
        if is_changed and PEFT_PLACEHOLDER not in text:
            return text if license is None else _with_license(text, license)
    facts = describe_folder(folder) if facts is None else facts
    facts["model"] = repo_id
    if base_id is not None:
        facts["adapter"] = {"base": base_id, "base_is_on_hub": True}
    if adapter_id is not None:
        facts["is_base_of"] = adapter_id
    backbones = [part["source"] for part in facts["parts"] if part["on_hub"]]
    facts["licenses"] = {repo_id: license} if license else {name: license_of(name) for name in backbones}
    return render_card(facts, pictures_of(folder))


def _with_license(text: str, license: str) -> str:
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data["license"] = license
    return str(card)


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return facts about a folder without `card.json`: names, sizes and dtypes of the model's parts."""
    from ..backbones_qformer import BACKBONES  # imports torch
    from ..configuration_qformer import PrecomputedFeaturesConfig, is_hub_id

    sizes = count_parameters(folder)
    if not sizes:
        return {"parts": []}
    config = json.loads((folder / CONFIG_NAME).read_text())
    vision_config = config.get("vision_config") or {}
    has_vision_model = vision_config.get("model_type") != PrecomputedFeaturesConfig.model_type
    parts = []
    is_pretrained = config.get("model_type") == "qformer_pretraining"
    heads = ("vision_projection", "text_projection", "itm_head", "lm_head")
    names = ("vision_model", "qformer", *heads) if is_pretrained else (*BACKBONES, "qformer", "language_projection")
    for name in names:
        if name == "vision_model" and not has_vision_model:
            continue
        source = config.get(f"{name}_name_or_path")
        on_hub = is_hub_id(source)
        parts.append(
            {
                "name": name,
                "source": source if on_hub else "",
                "on_hub": on_hub,
                "revision": config.get(f"{name}_revision") if on_hub else None,
                "total": sizes.get(name),
                "trained": None,
                "dtype": (config["dtypes"] or {}).get(name, ""),
            }
        )
    return {
        "objective": "pretrain" if is_pretrained else "caption",
        "writes_captions": not is_pretrained or config.get("itg_weight", 1) > 0,
        "parts": parts,
        "feature_width": None if has_vision_model else vision_config["hidden_size"],
    }


def count_parameters(folder: Path) -> dict[str, int]:
    """Return the number of parameters of each part, read from the headers of the safetensors files."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, safe_open is not a dictionary
                part = name.split(".")[0]
                sizes[part] = sizes.get(part, 0) + math.prod(tensors.get_slice(name).get_shape())
    return sizes


def license_of(repo_id: str) -> str | None:
    """Return the licence that the card of a model states, or `None` if the card or its licence is not available."""
    with contextlib.suppress(OSError, ValueError, HTTPError, YAMLError):
        license = ModelCard.load(repo_id, ignore_metadata_errors=True).data.get("license")
        return license if isinstance(license, str) else None
    return None


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()
