"""The border between a vision encoder and the Q-Former: whatever an encoder returns becomes features and a mask.

Shapes: B images or videos, F frames of a video, N features of an image, Dv their width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import is_tracing

from .backbones_qformer import VisionModelPlaceholder, dtype_of, is_frozen
from .encoders_qformer import ENCODER_INPUTS, num_frames_of, reads_videos, run_encoder
from .features_qformer import bool_mask, check_is_finite, feature_mask

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


def features_of_inputs(
    vision_model: PreTrainedModel | VisionModelPlaceholder,
    pixel_values: torch.Tensor | None,
    image_embeds: torch.Tensor | None,
    image_attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> VisionFeaturesOutput:
    """Return the features of images, or the given features, with their mask.

    Args:
        vision_model (`PreTrainedModel`): the encoder.
        pixel_values (`[B, 3, H, W]`, or `[B, F, 3, H, W]` for videos, float): images; or
        image_embeds (`[B, N, Dv]`, or `[B, F, N, Dv]` for videos, float): their features.
        image_attention_mask (`[B, N]` or `[B, F, N]`, *optional*): 1 for a feature, 0 for a feature to ignore.
        kwargs: those of `VISION_INPUTS` that the images need, and arguments of the encoder.

    Raises:
        TypeError: if `image_embeds` are not a tensor.
        ValueError: if both or neither of `pixel_values` and `image_embeds` are given, or they or their mask have
            another shape. Also if features hold NaN or infinity.
    """
    if (pixel_values is None) == (image_embeds is None):
        raise ValueError("Pass either `pixel_values` (images) or `image_embeds` (features of images), not both.")
    if image_embeds is not None and not isinstance(image_embeds, torch.Tensor):
        raise TypeError(
            f"`image_embeds` must be a tensor [B, N, D], not {type(image_embeds).__name__!r}: "
            "`model.processor(image_embeds=...)` makes one of rows that differ in length, and their mask."
        )
    if pixel_values is not None:
        outputs = encode_images(vision_model, pixel_values, **kwargs)
    else:
        assert image_embeds is not None
        frame_attention_mask = kwargs.pop("frame_attention_mask", None)
        if ignored := [name for name in VISION_INPUTS if kwargs.get(name) is not None]:
            raise ValueError(f"`{ignored[0]}` belongs to `pixel_values`: leave it out beside `image_embeds`.")
        outputs = VisionFeaturesOutput(last_hidden_state=image_embeds)
        if frame_attention_mask is not None:
            outputs = mask_frames(outputs, frame_attention_mask)
    if image_attention_mask is not None:
        mask = feature_mask(outputs.last_hidden_state, image_attention_mask)
        if outputs.attention_mask is not None:
            mask = mask & outputs.attention_mask
        outputs = VisionFeaturesOutput(**{**outputs, "attention_mask": mask})
    if pixel_values is None:
        check_is_finite(outputs.last_hidden_state, outputs.attention_mask)
    return outputs


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
