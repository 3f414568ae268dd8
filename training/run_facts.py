"""TODO."""

import contextlib
import json
import os
import platform
import re
from importlib.metadata import version

import datasets
import torch
from peft import PeftModel
from transformers import TrainerState

from ..backbones_qformer import BACKBONES, VisionModelPlaceholder, dtype_of, is_quantized
from ..configuration_qformer import is_hub_id
from ..data.dataset import CaptionDataset
from ..data.mixture import CaptionMixture
from ..data.streaming import CaptionStream
from ..evaluation.scoring import SCORE_NAMES
from ..hub.model_card import text_sha256
from ..modeling_qformer import QFormerCaptioner
from .arguments import DataArguments, of_each

# What a run is called, where it goes and how it talks is no part of the recipe.
PRIVATE_OPTIONS = re.compile(
    "hub_|push_|output_dir|overwrite_|run_name|resume_|report_to|project|trackio_|disable_tqdm"
)
PLACES = re.compile("_name$|_path$|_folder$|_tokenizer$|^features$|^recipe$")  # options whose values are names or paths

# What the run knows


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
                "total": None if isinstance(part, VisionModelPlaceholder) else total,
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
