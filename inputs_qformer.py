"""Images, videos, features and texts as the tensors that a model reads.

processing_qformer.py calls these functions, and data/ for features that are computed beforehand.
"""

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .encoders_qformer import ENCODER_INPUTS
from .features_qformer import feature_mask, pad_features


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], return_tensors: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Return what a tokenizer computes for texts: `input_ids` and `attention_mask` (`[B, P]`, long; P may be 0)."""
    tokens = dict(tokenizer(texts, return_tensors=return_tensors, **options))
    if return_tensors == "pt":  # empty texts come as float tensors
        tokens = {name: value.long() for name, value in tokens.items()}
    return tokens


def without_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text without the special tokens of a tokenizer, so that it can neither end early nor start anew."""
    return re.sub("|".join(map(re.escape, tokenizer.all_special_tokens)), " ", text).strip()


def load_image_processor(
    name_or_path: str | os.PathLike, revision: str | None = None, **files: Any
) -> BaseImageProcessor:
    """Load the image processor of a vision encoder. No code from the Hub is executed.

    Args:
        name_or_path: Hub id or folder.
        revision: branch, tag or commit on the Hub.
        files: further arguments of `from_pretrained` that say where the files are, such as `token` and `subfolder`.

    Raises:
        OSError: if it cannot be fetched.
    """
    config, _ = PreTrainedConfig.get_config_dict(str(name_or_path), revision=revision, **files)
    if config.get("model_type") == "timm_wrapper":
        return timm_image_processor(config["pretrained_cfg"])
    return AutoImageProcessor.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **files)


def timm_image_processor(pretrained_cfg: dict[str, Any]) -> CLIPImageProcessorPil:
    """Return an image processor that does what timm does in evaluation.

    That of transformers for timm models needs timm and torchvision, and cannot be saved.

    Args:
        pretrained_cfg: `pretrained_cfg` in the `config.json` of a timm model.
    """
    _, height, width = pretrained_cfg["input_size"]
    larger = [math.floor(side / pretrained_cfg.get("crop_pct", 0.875)) for side in (height, width)]
    keeps_ratio = height == width and pretrained_cfg.get("crop_mode", "center") == "center"
    return CLIPImageProcessorPil(
        size={"shortest_edge": larger[0]} if keeps_ratio else {"height": larger[0], "width": larger[1]},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[pretrained_cfg.get("interpolation", "bilinear").upper()],
        image_mean=list(pretrained_cfg["mean"]),
        image_std=list(pretrained_cfg["std"]),
    )


def prepare_images(image_processor: Any, images: list[Image.Image], **options: Any) -> dict[str, Any]:
    """Return what a vision encoder reads: `pixel_values` `[B, ...]`, and those of `ENCODER_INPUTS` that belong to them.

    Raises:
        ValueError: if the image processor does not return one entry for each image.
    """
    outputs = image_processor(images, **options)
    batch = {name: outputs[name] for name in ("pixel_values", *ENCODER_INPUTS) if name in outputs}
    if np.all(np.asarray(batch.get("pixel_mask", 1))):  # of images of one size, which YOLOS does not read
        batch.pop("pixel_mask", None)
    shape = np.shape(batch["pixel_values"])
    if len(shape) == 5 and shape[:2] == (1, len(images)):  # VideoMAE's makes one video of all images
        batch["pixel_values"] = batch["pixel_values"][0]
    elif shape[0] != len(images):
        raise ValueError(
            f"A {type(image_processor).__name__} makes {shape[0]} rows of {len(images)} images, because it cuts them "
            "into tiles: use another image processor, such as that of CLIP or SigLIP, in the size of the encoder."
        )
    return batch


def prepare_videos(
    image_processor: Any,
    frames: list[Image.Image],
    lengths: list[int],
    return_tensors: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Return `pixel_values` `[B, F, 3, H, W]` of videos and, if they differ in length, `frame_attention_mask` `[B, F]`.

    Args:
        image_processor: image processor of the vision encoder.
        frames: the frames of all videos, one after another.
        lengths: number of frames of each video.
        return_tensors: type of the result.
        options: options of the image processor.

    Raises:
        ValueError: if frames get different sizes, or the encoder needs further inputs for each image.
    """
    outputs = image_processor(frames, **options)
    if others := [name for name in ENCODER_INPUTS if name in outputs]:
        raise ValueError(
            f"A {type(image_processor).__name__} prepares each image in its own shape ({others[0]!r}), which videos "
            "cannot have: use a vision encoder of images of one size, such as CLIP or SigLIP."
        )
    prepared = [torch.as_tensor(np.asarray(image)) for image in outputs["pixel_values"]]
    if prepared[0].ndim == 4:  # VideoMAE's makes one video of all frames
        prepared = list(prepared[0])
    if len({image.shape for image in prepared}) > 1:
        sizes = " and ".join(sorted({f"{image.shape[-1]} x {image.shape[-2]}" for image in prepared})[:2])
        raise ValueError(
            f"The frames of the videos are prepared to different sizes, such as {sizes} pixels: let the image "
            "processor resize and crop them, or give frames of one size."
        )
    parts = torch.stack(prepared).split(lengths)
    batch = {"pixel_values": pad_sequence(parts, batch_first=True)}  # padding is zeros
    if min(lengths) < max(lengths):
        ones = [torch.ones(length, dtype=torch.long) for length in lengths]
        batch["frame_attention_mask"] = pad_sequence(ones, batch_first=True)
    return dict(BatchFeature(batch, tensor_type=return_tensors))


def prepare_features(
    image_embeds: torch.Tensor | np.ndarray | Sequence[Any],
    image_attention_mask: torch.Tensor | None,
    return_tensors: str | None = None,
) -> dict[str, Any]:
    """Return features as a batch: `image_embeds` `[B, N, Dv]` and, with padding, `image_attention_mask` `[B, N]`.

    Args:
        image_embeds: one row `[N, Dv]`, a list of rows, or a batch `[B, N, Dv]`, of videos `[B, F, N, Dv]`.
        image_attention_mask: mask of a batch.
        return_tensors: type of the result.

    Raises:
        TypeError: if the features are not numbers.
        ValueError: if the features or their mask have another shape.
    """
    ndim = image_embeds.ndim if isinstance(image_embeds, torch.Tensor | np.ndarray) else None
    if ndim in (3, 4):
        batch = {"image_embeds": torch.as_tensor(image_embeds)}
        if image_attention_mask is not None:
            batch["image_attention_mask"] = feature_mask(batch["image_embeds"], image_attention_mask)
    elif image_attention_mask is None:
        batch = pad_features([image_embeds] if ndim == 2 else list(image_embeds))
    else:
        raise ValueError(
            "`image_attention_mask` belongs to a batch of features [B, N, D]: leave it out for a list of rows, which "
            "is padded here."
        )
    return dict(BatchFeature(batch, tensor_type=return_tensors))
