"""Facts of a run for its model card: parts, data, options, evaluation protocol, scores, hardware and versions.

Cards are published, so no fact names a folder of this machine.
"""

import contextlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import datasets
import torch
from transformers import PreTrainedModel, TrainerState

from ..backbones_qformer import VisionModelPlaceholder, dtype_of, is_quantized
from ..configuration_qformer import is_hub_id
from ..data.columns import Rows, column_names
from ..data.dataset import CaptionDataset, CaptionSource
from ..data.mixture import CaptionMixture
from ..data.streaming import CaptionStream
from ..data.texts import caption_columns
from ..evaluation.scoring import SCORE_NAMES
from ..hub.model_card import text_sha256
from ..metrics.tokenizers import describe_tokenizer
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining
from ..saving_qformer import QFormerPreTrainedModel
from .arguments import DataArguments
from .data_setup import DatasetSpec, TrainingData, evaluation_spec, training_specs
from .lora import captioner_of, without_adapters
from .run import TrainingRun
from .scores import RECALL_NAMES, CaptionScorer, ScoreFunction
from .training_arguments import QFormerTrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel

# Options about names, publishing and logging, which are not needed to reproduce a run.
PRIVATE_OPTIONS = re.compile(
    "hub_|push_|output_dir|overwrite_|run_name|resume_|report_to|project|trackio_|disable_tqdm"
)
# Options whose values are names or paths.
PATH_OPTIONS = re.compile("_name$|_path$|_folder$|_tokenizer$|^features$|^recipe$|^reward_funcs$")
PACKAGES = ("qformer-captioner", "torch", "transformers", "peft", "datasets")


def describe_run(
    run: TrainingRun,
    model: "QFormerPreTrainedModel | PeftModel",
    train_data: TrainingData,
    eval_data: CaptionDataset | None,
    score: ScoreFunction | None = None,
) -> dict:
    """Return the facts of a run that are known before training, in the format of `hub/model_card.py`.

    Args:
        run: the run.
        model: the model, or the adapter on it.
        train_data: the rows to train on.
        eval_data: the rows to evaluate on, if there are any.
        score: the score function of generated captions, if evaluations generate captions.
    """
    base = without_adapters(model)
    starts_from = run.model_args.model_name_or_path
    starts_from = starts_from if is_hub_id(starts_from) else None
    facts = {
        "objective": run.objective,
        "writes_captions": not isinstance(base, QFormerForPretraining) or base.config.itg_weight > 0,
        "model": run.training_args.hub_model_id or shown_name(str(run.output_dir.absolute())),
        "starts_from": starts_from,
        "parts": describe_parts(model, {"qformer": run.model_args.text_model_name_or_path}),
        "feature_width": base.feature_width,
        "data": describe_data(run.data_args, train_data),
        "options": describe_options(run.changed_options),
        **describe_machine(run.training_args.world_size),
    }
    if run.objective == "reward":
        facts["rewards"] = [shown_name(name) for name in reward_names(run.training_args)]
    if eval_data is not None:
        facts["evaluation"] = describe_evaluation(run.data_args, eval_data)
        if score is not None:
            facts["evaluation"] |= describe_generation(run, captioner_of(base), eval_data, score)
    if model is not base:
        facts["adapter"] = {
            "base": starts_from or "the captioner in base/",
            "base_is_on_hub": starts_from is not None,
        }
    return facts


def describe_generation(
    run: TrainingRun, captioner: QFormerCaptioner, eval_data: CaptionDataset, score: ScoreFunction
) -> dict:
    """Return how captions are generated and scored."""
    prompt = "" if captioner.processor is None else captioner.processor.prompt
    facts = {
        "prompt": "that of each row" if any(eval_data.row_prompts()) else prompt,
        "num_beams": run.training_args.generation_num_beams,
        "max_new_tokens": run.training_args.generation_max_length,
    }
    if isinstance(score, CaptionScorer):
        facts["tokenizer"] = shown_name(describe_tokenizer(score.tokenize))
    return facts


def reward_names(args: QFormerTrainingArguments) -> list[str]:
    """Return the names of the rewards to train by."""
    return args.reward_funcs or ["cider"]


def shown_name(name: str) -> str:
    """Return a Hub id unchanged, or the last part of a path."""
    if is_hub_id(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------


def describe_parts(
    model: "QFormerPreTrainedModel | PeftModel", sources: Mapping[str, str | None] | None = None
) -> list[dict]:
    """Return name, origin, numbers of parameters and dtype of each part of a model.

    Args:
        model: the model, or the adapter on it. Its trainable parameters are counted, so call this before training ends.
        sources: origin of parts other than the backbones, by name.
    """
    base = without_adapters(model)
    parts = []
    counted: set[int] = set()  # two parts may share a weight, which belongs to the first
    for name, part in base.named_children():
        if name == "vision_model" and not base.config.has_vision_model:
            continue
        source = getattr(base.config, f"{name}_name_or_path") if name in base.backbones else (sources or {}).get(name)
        # peft keeps a second, frozen copy of modules that it trains in full.
        weights = [weight for key, weight in part.named_parameters() if "original_module." not in key]
        weights = [weight for weight in weights if id(weight) not in counted]
        counted.update(map(id, weights))
        total = sum(weight.numel() for weight in weights)
        if isinstance(part, PreTrainedModel) and is_quantized(part):
            total = part.num_parameters()  # a byte holds several weights
        on_hub = is_hub_id(source)
        parts.append(
            {
                "name": name,
                "source": shown_name(source) if source else "",
                "on_hub": on_hub,
                "revision": getattr(base.config, f"{name}_revision") if on_hub and name in base.backbones else None,
                "total": None if isinstance(part, VisionModelPlaceholder) else total,
                "trained": sum(weight.numel() for weight in weights if weight.requires_grad),
                "dtype": str(dtype_of(part)).removeprefix("torch."),
            }
        )
    return parts


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def describe_data(args: DataArguments, train_data: TrainingData) -> list[dict]:
    """Return name, version and size of each data set that a run trains on.

    Args:
        args: the options of the data.
        train_data: the rows to train on.
    """
    parts: Sequence[CaptionDataset | CaptionSource]
    if isinstance(train_data, CaptionStream):
        parts = train_data.sources
    elif isinstance(train_data, CaptionMixture):
        parts = train_data.parts
    else:
        parts = [train_data]
    return [
        {
            "name": shown_name(spec.name),
            "on_hub": is_hub_data(spec.name),
            "config": spec.config_name,
            "revision": content_version(spec, part.rows),
            "split": args.train_split,
            "rows": len(part) if isinstance(part, CaptionDataset) else None,
            "columns": columns_of(part),
        }
        for spec, part in zip(training_specs(args), parts, strict=True)
    ]


def columns_of(part: CaptionDataset | CaptionSource) -> list[str]:
    """Return the columns of images, captions and prompts that are read. Rows with features may have no images."""
    source = part.source if isinstance(part, CaptionDataset) else part
    has_images = not isinstance(part, CaptionDataset) or part.images is not None
    images = [source.image_column] if has_images else []
    captions = caption_columns(source.caption_column, column_names(source.rows))
    return [*images, *captions, *filter(None, [source.prompt_column])]


def describe_evaluation(args: DataArguments, rows: CaptionDataset) -> dict:
    """Return a description of the rows and references on which a run is evaluated.

    Args:
        args: the options of the data.
        rows: the rows to evaluate on.
    """
    spec, references = evaluation_spec(args), rows.references()
    # Held-out rows of the training split are named as such, so that they are not mistaken for training rows.
    split = rows.split
    if args.train_val_split and args.eval_dataset_name is None and rows.split.split(" of ")[0] == args.train_split:
        split += f", its last {len(references)} rows"
    return {
        "name": shown_name(spec.name),
        "on_hub": is_hub_data(spec.name),
        "revision": content_version(spec, rows.rows),
        "split": split,
        "images": len(references),
        "references": sum(map(len, references)),
        "references_sha256": text_sha256(json.dumps(references)),
    }


def is_hub_data(name: str) -> bool:
    """Return True if a data set is on the Hub."""
    return name != "scenes" and is_hub_id(name)


def content_version(spec: DatasetSpec, rows: Rows) -> str | None:
    """Return the Hub commit that rows came from, otherwise their fingerprint, or `None` for a stream."""
    if is_hub_data(spec.name):
        with contextlib.suppress(OSError, ValueError):  # `datasets` names cached data after the commit
            return datasets.load_dataset_builder(spec.name, spec.config_name, revision=spec.revision).hash
    return rows._fingerprint if isinstance(rows, datasets.Dataset) else None


# ----------------------------------------------------------------------------------------------------------------------
# Options, machine and results
# ----------------------------------------------------------------------------------------------------------------------


def describe_options(options: dict[str, object]) -> dict[str, str]:
    """Return the options for the model card, without tokens and without the folders of paths."""
    shown = {}
    for name, value in options.items():
        if PRIVATE_OPTIONS.match(name):
            continue
        values = value if isinstance(value, list) else [value]
        shown[name] = ", ".join(
            shown_name(item) if isinstance(item, str) and may_be_path(name, item) else str(item) for item in values
        )
    return shown


def may_be_path(option: str, value: str) -> bool:
    """Return True if the value of an option may be a local path.

    Patterns and folders that no longer exist are recognised by the name of the option.
    """
    return os.path.isabs(value) or os.path.exists(value) or PATH_OPTIONS.search(option) is not None


def describe_machine(processes: int) -> dict:
    """Return hardware and package versions.

    Args:
        processes: number of processes of the run, each with one GPU if there are any.
    """
    if torch.cuda.is_available():
        hardware = f"{processes} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()})"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # this package may run from a checkout
            versions[package] = version(package)
    return {"hardware": hardware, "versions": versions}


def describe_results(state: TrainerState, score_name: str | None) -> dict:
    """Return losses and scores of one evaluation, or nothing before the first evaluation.

    Args:
        state: the state of the Trainer, with its log.
        score_name: score that selected the final weights, whose evaluation is described; `None` for the last one.
    """
    evaluations = [entry for entry in state.log_history if "eval_loss_shuffled" in entry]
    if not evaluations:
        return {}
    best = [entry for entry in evaluations if score_name and entry["step"] == state.best_global_step]
    entry = (best or evaluations)[-1]
    pairs = [key.removeprefix("eval_") for key in entry if f"{key}_shuffled" in entry]
    names = [name for name in pairs if not name.endswith("loss")]
    return {
        "losses": {"matched": entry["eval_loss"], "shuffled": entry["eval_loss_shuffled"]},
        "parts_of_loss": [
            {"name": name, "matched": entry[f"eval_{name}"], "shuffled": entry[f"eval_{name}_shuffled"]}
            for name in pairs
            if name.endswith("_loss")
        ],
        "scores": [
            {
                "type": name,
                "name": (SCORE_NAMES | RECALL_NAMES).get(name, name),
                "value": 100 * entry[f"eval_{name}"],
                "shuffled": 100 * entry[f"eval_{name}_shuffled"],
            }
            for name in names
        ],
        "step": entry["step"],
        "chosen": score_name if best else None,
    }
