"""Steps to set up the model of a run that every objective shares."""

import itertools
import json
from typing import Any, cast

import torch

from ..common.errors import InputError
from ..common.onednn import onednn_linears
from ..data.collator import CaptionCollator, PretrainingCollator
from ..encoders_qformer import num_frames_of, reads_videos
from ..modeling_qformer import QFormerCaptioner
from ..pretraining_qformer import QFormerForPretraining
from ..processing_qformer import QFormerProcessor
from ..saving_qformer import QFormerPreTrainedModel
from ..vision_qformer import encode_images, split_vision_inputs
from .arguments import ModelArguments
from .data_setup import TrainingData
from .run import TrainingRun

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def qformer_fields(args: ModelArguments) -> dict[str, Any]:
    """Return the fields of a new Q-Former that the options set."""
    fields = parse_config(args.qformer_config, "qformer_config")
    if "num_frames" in fields:
        raise InputError(
            "Set the number of frames with --num_frames instead of --qformer_config, because the data needs it, too."
        )
    return fields if args.num_frames is None else {**fields, "num_frames": args.num_frames}


def backbone_dtype(dtype: str) -> str:
    """Return the dtype of pretrained backbones: "auto" is bfloat16 on GPUs that support it, otherwise float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def parse_config(text: str | None, name: str) -> dict:
    """Return a configuration that an option holds as JSON.

    Args:
        text: the value of the option.
        name: the option, for messages.

    Raises:
        InputError: if the text is not JSON, or not a mapping of fields to values.
    """
    try:
        config = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f'--{name} must be JSON with fields and values, such as {{"hidden_size": 384}}, not {text}.')
    return config


def set_num_frames(
    model: QFormerCaptioner | QFormerForPretraining, processor: QFormerProcessor, args: ModelArguments
) -> None:
    """Let the model read as many frames of a video as the option says. By default it keeps its own number.

    Raises:
        InputError: if its Q-Former, or its encoder of videos, tells fewer frames apart.
    """
    if args.num_frames is None:
        return
    vision_config = model.vision_model.config
    known = num_frames_of(vision_config) if reads_videos(vision_config) else model.qformer.config.num_frames
    if known is not None and args.num_frames > known:
        raise InputError(
            f"The model tells {known} frames apart, fewer than --num_frames {args.num_frames}: give a smaller "
            "number, or train a new model."
        )
    processor.num_frames = args.num_frames


# ----------------------------------------------------------------------------------------------------------------------
# Before training
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def normalize_image_features(
    model: QFormerCaptioner | QFormerForPretraining,
    train_data: TrainingData,
    collate: CaptionCollator | PretrainingCollator,
    num_samples: int,
) -> None:
    """Fold image feature normalisation, with the statistics of the first training images, into a new Q-Former.

    Args:
        model: the model.
        train_data: the rows to train on.
        collate: collator of the rows.
        num_samples: number of rows to use.

    Raises:
        InputError: if there are fewer than two images.
    """
    rows = itertools.islice(iter(train_data), num_samples)
    features: list[torch.Tensor] = []
    while batch_rows := list(itertools.islice(rows, 32)):
        batch = collate(batch_rows)
        image_embeds, mask = batch.get("image_embeds"), batch.get("image_attention_mask")
        if image_embeds is None:
            vision_inputs, _ = split_vision_inputs({name: value.to(model.device) for name, value in batch.items()})
            with onednn_linears(model.device):
                outputs = encode_images(model.vision_model, batch["pixel_values"].to(model.device), **vision_inputs)
            image_embeds, mask = cast(torch.Tensor, outputs.last_hidden_state), outputs.attention_mask
        features.append(model.qformer.summarize_features(image_embeds, mask))
    if sum(map(len, features)) < 2:
        raise InputError("--normalize_image_features_samples needs at least two training rows.")
    model.qformer.normalize_image_features(torch.cat(features))


def backbones_to_include(run: TrainingRun, model: QFormerPreTrainedModel) -> bool | list[str]:
    """Return the frozen backbones to store in saved folders, for `save_pretrained(include_backbones=...)`."""
    if run.run_args.include_backbones == "auto":
        return model.local_backbones()
    return run.run_args.include_backbones == "true"


def check_publishable(run: TrainingRun, model: QFormerPreTrainedModel) -> None:
    """Check that others can load a model that the run publishes.

    Raises:
        InputError: if it would keep backbones of a local folder by reference.
    """
    leaves_out = run.run_args.include_backbones == "false"
    if run.training_args.push_to_hub and leaves_out and model.local_backbones():
        raise InputError(
            "--include_backbones false leaves out backbones that only this machine has, so nobody could open the "
            "model that --push_to_hub publishes: leave out one of the two options."
        )
