"""The border between a vision encoder and the Q-Former: whatever an encoder returns becomes features and a mask.

Shapes: B images or videos, F frames of a video, N features of an image, Dv their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_tracing

from .backbones_qformer import VisionModelPlaceholder, dtype_of, is_frozen
from .encoders_qformer import ENCODER_INPUTS, num_frames_of, reads_videos, run_encoder

# All inputs of a captioner that belong to its `pixel_values`.
VISION_INPUTS = (*ENCODER_INPUTS, "frame_attention_mask", "interpolate_pos_encoding")


@dataclass
class VisionFeaturesOutput(BaseModelOutputWithPooling):
    """Output of a vision encoder.

    Args:
        last_hidden_state (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): features.
        attention_mask (`[B, N]` or `[B, F, N]`, bool, *optional*): `False` for padding. `None` without padding.
    """

    last_hidden_state: torch.Tensor = None  # type: ignore[assignment]  # never missing, unlike in the base class
    attention_mask: torch.Tensor | None = None


def split_vision_inputs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that belong to `pixel_values`, and the others."""
    vision_inputs = {name: kwargs[name] for name in VISION_INPUTS if kwargs.get(name) is not None}
    return vision_inputs, {name: value for name, value in kwargs.items() if name not in VISION_INPUTS}


def encode_images(
    vision_model: PreTrainedModel | VisionModelPlaceholder, pixel_values: torch.Tensor, **kwargs: Any
) -> VisionFeaturesOutput:
    """Run a vision encoder on images `[B, 3, H, W]`, or on each frame of videos `[B, F, 3, H, W]`.

    An encoder that reads videos, such as VideoMAE, gets whole videos, and returns features `[B, N, Dv]` of each. In
    videos that are too short for it, frames are repeated evenly. A frozen encoder records no graph.

    Args:
        vision_model (`PreTrainedModel`): the encoder.
        pixel_values (`[B, 3, H, W]` or `[B, F, 3, H, W]`, float): images; cast to the dtype of the encoder.
        kwargs: those of `VISION_INPUTS` that the images need, and arguments of the encoder, such as
            `output_hidden_states`.

    Raises:
        ValueError: if the encoder does not read one of the `VISION_INPUTS`, or returns no sequence of features. Also if
            the mask of frames does not have the shape `[B, F]`, or the images do not have their shape.
    """
    frame_attention_mask = kwargs.pop("frame_attention_mask", None)
    if pixel_values.numel() == 0:
        raise ValueError(f"There are no images or frames in `pixel_values`, whose shape is {list(pixel_values.shape)}.")
    if pixel_values.ndim not in (4, 5) and kwargs.get("spatial_shapes") is None:  # NaFlex gets patches [B, N, P]
        raise ValueError(
            "`pixel_values` must have the shape [B, 3, H, W], or [B, F, 3, H, W] for videos, not "
            f"{list(pixel_values.shape)}: `model.processor(images=...)` prepares them."
        )
    is_video = pixel_values.ndim == 5 and not reads_videos(vision_model.config)
    if pixel_values.ndim == 5 and not is_video:
        number = max(num_frames_of(vision_model.config) or 1, pixel_values.shape[1])
        pixel_values, frame_attention_mask = stretch_videos(pixel_values, frame_attention_mask, number), None
    images = pixel_values.flatten(0, 1) if is_video else pixel_values
    # requires_grad_(False) is not enough, because gradient checkpointing makes the input of the encoder require
    # gradients.
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_frozen(vision_model)):
        features, mask, outputs = run_encoder(
            cast(PreTrainedModel, vision_model), images.to(dtype_of(vision_model)), **kwargs
        )
    others = {name: outputs.get(name) for name in ("pooler_output", "hidden_states", "attentions")}
    output = VisionFeaturesOutput(last_hidden_state=features, attention_mask=mask, **others)
    if is_video:
        frames = {"last_hidden_state": output.last_hidden_state.unflatten(0, pixel_values.shape[:2])}
        if output.attention_mask is not None:
            frames["attention_mask"] = output.attention_mask.unflatten(0, pixel_values.shape[:2])
        output = VisionFeaturesOutput(**{**output, **frames})
    return output if frame_attention_mask is None else mask_frames(output, frame_attention_mask)


def stretch_videos(
    pixel_values: torch.Tensor, frame_attention_mask: torch.Tensor | None, num_frames: int
) -> torch.Tensor:
    """Repeat the frames of short videos evenly: `[B, F, 3, H, W]` -> `[B, num_frames, 3, H, W]`.

    Args:
        pixel_values: the videos.
        frame_attention_mask (`[B, F]`, *optional*): 0 for padding, which is left out.
        num_frames: number of frames of each result, at least F.

    Raises:
        ValueError: if the mask does not have the shape `[B, F]`, holds other values than 0 and 1, or leaves a video
            without frames.
    """
    shape = pixel_values.shape[:2]
    if frame_attention_mask is None:
        if shape[1] == num_frames:
            return pixel_values
        frame_attention_mask = pixel_values.new_ones(shape)
    if frame_attention_mask.shape != shape:
        raise ValueError(
            f"`frame_attention_mask` has the shape {list(frame_attention_mask.shape)}, but must have one entry for "
            f"each frame: {list(shape)}."
        )
    mask = bool_mask("`frame_attention_mask`", frame_attention_mask, pixel_values.device).int()
    real_first = mask.argsort(dim=1, descending=True, stable=True)
    last = mask.sum(dim=1, keepdim=True) - 1
    if not is_tracing(mask) and (last < 0).any():
        raise ValueError(
            f"Video {int(last.argmin())} of the batch has no frames: its mask is 0 everywhere. Leave it out."
        )
    places = torch.arange(num_frames, device=mask.device) * last / max(1, num_frames - 1)  # [B, num_frames]
    chosen = real_first.gather(1, places.round().long())
    return pixel_values[torch.arange(len(mask), device=mask.device)[:, None], chosen]


def mask_frames(output: VisionFeaturesOutput, frame_attention_mask: torch.Tensor) -> VisionFeaturesOutput:
    """Mask the features `[B, F, N, Dv]` of the frames that are padding.

    Raises:
        ValueError: if the mask of frames does not have the shape `[B, F]`, holds other values than 0 and 1, or there
            are no frames.
    """
    features, mask = output.last_hidden_state, output.attention_mask
    if features.ndim != 4 or frame_attention_mask.shape != features.shape[:2]:
        raise ValueError(
            f"`frame_attention_mask` has the shape {list(frame_attention_mask.shape)}, but must have one entry for "
            f"each frame: the features have the shape {list(features.shape)}, which is [B, F, N, D] for videos."
        )
    of_frames = bool_mask("`frame_attention_mask`", frame_attention_mask, features.device)
    of_frames = of_frames[:, :, None].expand(features.shape[:3])
    return VisionFeaturesOutput(**{**output, "attention_mask": of_frames if mask is None else mask & of_frames})


def feature_mask(features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a mask of features as bool on their device.

    Args:
        features (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): the features.
        mask (`[B, N]` or `[B, F, N]`): 1 or `True` for a feature, 0 or `False` for padding.

    Raises:
        ValueError: if the mask has another shape, or holds other values.
    """
    mask = torch.as_tensor(mask, device=features.device)
    if mask.shape != features.shape[:-1]:
        raise ValueError(
            f"The mask of the features (`image_attention_mask` of a captioner) has the shape {list(mask.shape)}, "
            f"but the features need {list(features.shape[:-1])}: 1 for each feature, 0 for padding."
        )
    return bool_mask("The mask of the features (`image_attention_mask` of a captioner)", mask, features.device)


def bool_mask(name: str, mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a mask as bool on a device.

    Args:
        name: what messages call the mask.
        mask: 1 or `True` for what is real, 0 or `False` for padding.
        device: the device.

    Raises:
        ValueError: if the mask holds other values.
    """
    if mask.dtype != torch.bool and not is_tracing(mask) and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"{name} holds other values than 1 for what is real and 0 for padding. It is not added to attention scores."
        )
    return mask.to(device).bool()


def pad_features(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return rows of features of any lengths as one batch, padded with zeros.

    Args:
        rows: tensors, arrays or lists `[N, Dv]`. N may differ.

    Returns:
        `image_embeds` (`[B, N, Dv]`) and, only if rows differ in length, `image_attention_mask` (bool `[B, N]`).

    Raises:
        TypeError: if a row does not hold numbers.
        ValueError: if there are no rows, a row has another shape, or rows differ in width.

    Example:

    ```python
    >>> batch = pad_features([torch.ones(2, 3), torch.ones(1, 3)])
    >>> batch["image_attention_mask"].tolist()
    [[True, True], [True, False]]
    ```
    """
    if len(rows) == 0:
        raise ValueError("There are no rows of features in `image_embeds`.")
    tensors = []
    for number, row in enumerate(rows):
        try:
            tensors.append(torch.as_tensor(row))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"Row {number} of the features (`image_embeds`) is a {type(row).__name__!r} that cannot be read "
                "as numbers: give a tensor, an array or lists [N, D]."
            ) from error
        if tensors[-1].ndim != 2 or 0 in tensors[-1].shape:
            raise ValueError(
                f"Row {number} of the features (`image_embeds`) has the shape {list(tensors[-1].shape)}, but must be "
                "[N, D] with at least one feature."
            )
    widths = [row.shape[1] for row in tensors]
    if len(set(widths)) > 1:
        other = next(number for number, width in enumerate(widths) if width != widths[0])
        raise ValueError(
            f"The rows of features (`image_embeds`) differ in width: row 0 has {widths[0]} numbers in each feature, "
            f"and row {other} has {widths[other]}. Use features of one encoder."
        )
    lengths = torch.tensor([len(row) for row in tensors])
    features = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    mask = torch.arange(features.shape[1]) < lengths[:, None]
    return {"image_embeds": features} if mask.all() else {"image_embeds": features, "image_attention_mask": mask}


def check_is_finite(image_embeds: torch.Tensor, mask: torch.Tensor | None = None) -> None:
    """Check that features `[B, ..., Dv]` without padding (mask bool `[B, ...]`) have no NaN and no infinity.

    Raises:
        ValueError: if a feature is not finite; the message names its row.
    """
    if is_tracing(image_embeds) or image_embeds.sum(dtype=torch.float32).isfinite():
        return
    finite = image_embeds.isfinite().all(dim=-1)
    finite = (finite if mask is None else finite | ~mask).flatten(1).all(dim=1)
    if not finite.all():  # and not only a sum that is too large
        raise ValueError(
            f"The features of row {int(finite.int().argmin())} of the batch (`image_embeds`) hold NaN or infinity. "
            "Compute them again, or leave out the row."
        )


def mean_features(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of the features of each row, without padding: `[B, ..., Dv]` -> `[B, Dv]` in float32.

    Args:
        features (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos): the features.
        mask (`[B, N]` or `[B, F, N]`, bool or int, *optional*): 1 for a feature, 0 for padding.

    Raises:
        ValueError: if the mask has another shape, or holds other values.
    """
    rows = features.float().reshape(len(features), -1, features.shape[-1])  # [B, N, Dv]
    if mask is None:
        return rows.mean(dim=1)
    real = feature_mask(features, mask).reshape(len(rows), -1, 1)
    return rows.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1)  # a weight of 0 does not remove a NaN
