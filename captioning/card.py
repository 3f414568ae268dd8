"""The model card of a captioner or adapter, made from what its run wrote down (`card.json`)."""

import contextlib
import hashlib
import html
import json
import math
import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import datasets
import jinja2
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError
from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerState
from transformers.utils import CONFIG_NAME
from yaml import YAMLError

from ..backbones_qformer import BACKBONES, AbsentVisionModel, dtype_of, is_quantized
from ..configuration_qformer import is_hub_id
from ..modeling_qformer import QFormerCaptioner
from .data import CaptionDataset
from .mixing import CaptionMixture
from .push import CARD, PICTURES
from .streams import CaptionStream
from .training_data import DataArguments, of_each

FACTS = "card.json"
SCORE_NAMES = {"cider": "CIDEr", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L"}
# What a run is called, where it goes and how it talks is no part of the recipe.
PRIVATE_OPTIONS = re.compile(
    "hub_|push_|output_dir|overwrite_|run_name|resume_|report_to|project|trackio_|disable_tqdm"
)
PLACES = re.compile("_name$|_path$|_folder$|_tokenizer$|^features$|^recipe$")  # options whose values are names or paths

# ----------------------------------------------------------------------------------------------------------------------
# What the run knows
# ----------------------------------------------------------------------------------------------------------------------


def shown_name(name: str) -> str:
    """A Hub id as it is; of a path the last part: where somebody keeps files is nobody's business."""
    if is_hub_id(name):
        return name
    return re.split(r"[/\\]", str(name).rstrip("/\\"))[-1]


def describe_parts(model: QFormerCaptioner | PeftModel) -> list[dict]:
    """Name, origin and parameters of each part; what trains is counted before training ends."""
    captioner = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = []
    for name, part in captioner.named_children():
        source = getattr(captioner.config, f"{name}_name_or_path") if name in BACKBONES else None
        # peft keeps a second, frozen Q-Former beside the one that trains.
        weights = [weight for own, weight in part.named_parameters() if "original_module." not in own]
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        total = part.num_parameters() if is_quantized(part) else sum(weight.numel() for weight in weights)
        on_hub = is_hub_id(source)
        parts.append(
            {
                "name": name,
                "source": shown_name(source) if source else "",
                "on_hub": on_hub,
                "revision": getattr(captioner.config, f"{name}_revision") if on_hub else None,
                "total": None if isinstance(part, AbsentVisionModel) else total,
                "trained": trained,
                "dtype": str(dtype_of(part)).removeprefix("torch."),
            }
        )
    return parts


def describe_data(args: DataArguments, train_data: CaptionDataset | CaptionMixture | CaptionStream) -> list[dict]:
    """The data sets of a run, with what tells their content: the Hub's commit, or datasets' fingerprint."""
    streamed = isinstance(train_data, CaptionStream)
    mixed = isinstance(train_data, CaptionMixture)
    parts = train_data.sources if streamed else train_data.parts if mixed else [train_data]
    described = []
    for part, name, config, revision, image_column, caption_column in zip(
        parts,
        args.dataset_name,
        of_each(args, "dataset_config_name"),
        of_each(args, "dataset_revision"),
        of_each(args, "image_column", "image"),
        of_each(args, "caption_column", "caption"),
        strict=True,
    ):
        described.append(
            {
                "name": shown_name(name),
                "on_hub": is_hub_data(name),
                "config": config,
                "revision": revision_of(name, config, revision, part.rows),
                "split": args.train_split,
                "rows": None if streamed else len(part),
                "columns": [image_column, caption_column],
            }
        )
    return described


def is_hub_data(name: str) -> bool:
    return name != "scenes" and is_hub_id(name)


def revision_of(name: str, config: str | None, asked: str | None, rows) -> str | None:
    """The commit of the Hub that rows came from, else their fingerprint; a stream from elsewhere has neither."""
    if is_hub_data(name):
        with contextlib.suppress(OSError, ValueError):  # the builder tells data in the cache by their commit
            return datasets.load_dataset_builder(name, config, revision=asked).hash
    return None if isinstance(rows, datasets.IterableDataset) else rows._fingerprint


def describe_evaluation(args: DataArguments, rows: CaptionDataset, prompt: str, num_beams: int, length: int) -> dict:
    """The protocol of the scores."""
    references = rows.references()
    # Held out of the rows that are trained on: to name their split alone would be to say that the scores are of them.
    own = args.eval_dataset_name is None and rows.split.split(" of ")[0] == args.train_split
    name, config, revision = args.eval_dataset_name, args.eval_dataset_config_name, args.eval_dataset_revision
    if name is None:
        name = args.dataset_name[0]
        config, revision = (of_each(args, option)[0] for option in ("dataset_config_name", "dataset_revision"))
    return {
        "name": shown_name(name),
        "on_hub": is_hub_data(name),
        "revision": revision_of(name, config, revision, rows.rows),
        "split": f"{rows.split}, its last {len(references)} rows" if args.train_val_split and own else rows.split,
        "images": len(references),
        "references": sum(map(len, references)),
        "references_sha256": text_sha256(json.dumps(references)),
        "prompt": prompt,
        "num_beams": num_beams,
        "max_new_tokens": length,
    }


def describe_options(options: dict[str, object]) -> dict[str, str]:
    """Options as a reader of the card may see them: without paths, names and tokens."""
    shown = {}
    for name, value in options.items():
        if PRIVATE_OPTIONS.match(name):
            continue
        values = value if isinstance(value, list) else [value]
        shown[name] = ", ".join(
            shown_name(each) if isinstance(each, str) and may_be_path(name, each) else str(each) for each in values
        )
    return shown


def may_be_path(option: str, value: str) -> bool:
    """Whether a value tells where somebody keeps files; patterns and folders that are gone do so, too."""
    return os.path.isabs(value) or os.path.exists(value) or PLACES.search(option) is not None


def describe_machine(processes: int) -> dict:
    """Hardware and versions."""
    if torch.cuda.is_available():
        hardware = f"{processes} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    packages = ("qformer-captioner", "torch", "transformers", "peft", "datasets")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(ModuleNotFoundError):  # ours may run from a checkout
            versions[package] = version(package)
    return {"hardware": hardware, "versions": versions}


def describe_results(state: TrainerState, score_name: str | None) -> dict:
    """Scores and losses of the last evaluation, or of that which was best by a score, where it chose the weights."""
    evaluations = [entry for entry in state.log_history if "eval_loss_shuffled" in entry]
    if not evaluations:
        return {}
    best = [entry for entry in evaluations if score_name and entry["step"] == state.best_global_step]
    found = (best or evaluations)[-1]
    names = [key.removeprefix("eval_") for key in found if f"{key}_shuffled" in found and key != "eval_loss"]
    return {
        "losses": {"matched": found["eval_loss"], "shuffled": found["eval_loss_shuffled"]},
        "scores": [
            {
                "type": name,
                "name": SCORE_NAMES.get(name, name),
                "value": 100 * found[f"eval_{name}"],
                "shuffled": 100 * found[f"eval_{name}_shuffled"],
            }
            for name in names
        ],
        "step": found["step"],
        "chosen": score_name if best else None,
    }


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
    text = ENVIRONMENT.get_template("card.md").render(
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


def pictures_of(folder: Path) -> tuple[str, ...]:
    return tuple(name for name in PICTURES if (folder / name).is_file())


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
