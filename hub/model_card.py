"""The model card of a captioner or adapter, made from what its run wrote down (`card.json`)."""

import contextlib
import hashlib
import html
import json
import math
import os
import re
from pathlib import Path
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers.utils import CONFIG_NAME
from yaml import YAMLError

from ..backbones_qformer import BACKBONES
from ..configuration_qformer import is_hub_id
from .layout import CARD, pictures_of

FACTS = "card.json"


def describe_folder(folder: Path) -> dict:
    """What is known of a captioner or an adapter without a run: its configuration, and how many weights are in it."""
    sizes = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = name.split(".")[0]
                sizes[part] = sizes.get(part, 0) + math.prod(tensors.get_slice(name).get_shape())
    if not sizes:
        return {"parts": []}
    config = json.loads((folder / CONFIG_NAME).read_text())
    parts = []
    for name in (*BACKBONES, "qformer", "language_projection"):
        source = config.get(f"{name}_name_or_path")
        on_hub = is_hub_id(source)
        part = {"name": name, "source": source if on_hub else "", "on_hub": on_hub}
        part |= {"revision": config.get(f"{name}_revision") if on_hub else None}
        parts.append(
            part | {"total": sizes.get(name), "trained": None, "dtype": (config["dtypes"] or {}).get(name, "")}
        )
    return {"parts": parts}


# ----------------------------------------------------------------------------------------------------------------------
# The card
# ----------------------------------------------------------------------------------------------------------------------


class Markdown(str):
    """Text that may stand in a card as it is."""


def one_line(text: object) -> str:
    """Without line breaks and control characters."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def escape(text: object) -> str:
    """Let any text stand in Markdown as itself: no markup, no HTML, no cell or line of its own."""
    if isinstance(text, Markdown):
        return text
    return re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", html.escape(one_line(text), quote=False))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    finalize=escape,  # of every expression in the template
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters["url"] = lambda name: Markdown(quote(name))
ENVIRONMENT.filters["number"] = lambda value, form="{:,}": Markdown(
    "" if value is None else form % value if "%" in form else form.format(value)
)
ENVIRONMENT.filters["code"] = lambda name: Markdown(re.sub(r"[^\w./-]", "_", name))


def render(facts: dict, pictures: tuple[str, ...] = ()) -> str:
    """The text of a card.

    Args:
        facts: as [`write_card`] keeps them.
        pictures: of `PICTURES`, those that lie beside it.
    """
    title = one_line(facts["model"].split("/")[-1])
    text = ENVIRONMENT.get_template("model_card_template.md").render(
        metadata=Markdown(metadata(facts).to_yaml()), title=title, facts=facts, pictures=pictures
    )
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", text)))


def metadata(facts: dict) -> ModelCardData:
    """What the Hub files the model under."""
    adapter = facts.get("adapter")
    sources = [part["source"] for part in facts["parts"] if part["on_hub"]]
    if adapter:
        sources = [adapter["base"]] if adapter["base_is_on_hub"] else []
    elif facts.get("starts_from"):
        sources = [facts["starts_from"]]
    relation = "adapter" if adapter else "finetune" if facts.get("starts_from") else None
    licenses = facts.get("licenses", {})
    told = licenses.get(facts["model"])  # by who publishes it
    unknown = None in licenses.values() or any(part["source"] and not part["on_hub"] for part in facts["parts"])
    licenses = [told] if told else [] if unknown else sorted(set(licenses.values()))
    results = None
    if facts.get("scores"):
        evaluation = facts["evaluation"]
        protocol = ("prompt", "num_beams", "max_new_tokens", "images", "references", "references_sha256")
        results = [
            EvalResult(
                task_type="image-text-to-text",
                task_name="Image captioning",
                dataset_type=evaluation["name"] if evaluation["on_hub"] else re.sub(r"\W+", "-", evaluation["name"]),
                dataset_name=one_line(evaluation["name"]),
                dataset_split=one_line(evaluation["split"]),
                dataset_revision=evaluation["revision"] if evaluation["on_hub"] else None,
                dataset_args={
                    name: one_line(evaluation[name]) if isinstance(evaluation[name], str) else evaluation[name]
                    for name in protocol
                },
                metric_type=score["type"],
                metric_name=score["name"],
                metric_value=round(score["value"], 2),
            )
            for score in facts["scores"]
        ]
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        base_model=sources or None,
        base_model_relation=relation if sources else None,
        license=licenses[0] if len(licenses) == 1 else licenses or None,
        datasets=sorted({data["name"] for data in facts.get("data", []) if data["on_hub"]}) or None,
        tags=["image-captioning", "q-former", "qformer-captioner", *(["lora"] if adapter else [])],
        model_name=one_line(facts["model"].split("/")[-1]) if results else None,
        eval_results=results,
    )


def write_card(folder: str | os.PathLike, facts: dict) -> None:
    """Write a card and, in `card.json`, the facts that it is made of, so that it can be made again for the Hub."""
    folder = Path(folder)
    text = render(facts, pictures_of(folder))
    (folder / CARD).write_text(text, encoding="utf-8")
    (folder / FACTS).write_text(json.dumps({**facts, "sha256": text_sha256(text)}, indent=2, default=str) + "\n")


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def card_for(
    folder: Path, repo_id: str, base: str | None = None, license: str | None = None, adapter: str | None = None
) -> str:
    """The card of a folder as it stands in a repository: one that somebody wrote or changed stays as it is.

    Args:
        repo_id: what its lines of usage load.
        base: the Hub id of the captioner that adapters are on.
        license: of the repository; by default those of the backbones, where the cards of all of them tell.
        adapter: the Hub id of the adapters that the captioner is for, and is nothing without.
    """
    facts = json.loads((folder / FACTS).read_text()) if (folder / FACTS).is_file() else None
    if (folder / CARD).is_file():
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
        changed = facts is None or facts["sha256"] != text_sha256(text)
        if changed and "[More Information Needed]" not in text:  # what peft leaves is a form, not a card
            if license is None:
                return text
            card = ModelCard(text, ignore_metadata_errors=True)
            card.data.license = license
            return str(card)
    facts = (describe_folder(folder) if facts is None else facts) | {"model": repo_id}
    if base is not None:
        facts["adapter"] = {"base": base, "base_is_on_hub": True}
    if adapter is not None:
        facts["is_base_of"] = adapter
    sources = [part["source"] for part in facts["parts"] if part["on_hub"]]
    facts["licenses"] = {repo_id: license} if license else {name: license_of(name) for name in sources}
    return render(facts, pictures_of(folder))


def license_of(repo_id: str) -> str | None:
    """What the card of a model says; `None` if it cannot be had."""
    with contextlib.suppress(OSError, ValueError, HTTPError, YAMLError):
        license = ModelCard.load(repo_id, ignore_metadata_errors=True).data.license
        return license if isinstance(license, str) else None
    return None
