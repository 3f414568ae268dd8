"""Differences among vision encoders: their class, their inputs, their outputs, and the width of their features.

Encoders of transformers and timm return tokens `[B, N, Dv]`, feature maps `[B, Dv, H, W]` or `[B, H, W, Dv]`, or the
patches of all images in one row. [`run_encoder`] returns features `[B, N, Dv]` of each. [`image_feature_size`] returns
their width Dv, which the Q-Former needs before the first image. Encoders that cannot serve are refused by name.
"""

import contextlib
import functools
import importlib
import inspect
import json
from typing import Any, cast

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

# Inputs of vision encoders beside `pixel_values`, which their image processors return.
ENCODER_INPUTS = ("pixel_attention_mask", "spatial_shapes", "image_sizes", "pixel_mask")
# Arguments of vision transformers that need not be given.
OPTIONAL_INPUTS = (
    *("attention_mask", "bool_masked_pos", "interpolate_pos_encoding", "noise", "patch_attention_mask"),
    *("context_mask", "target_mask", "skip_predictor"),  # of V-JEPA 2
    *("output_attentions", "output_hidden_states", "return_dict", "kwargs"),
)
# Encoders with feature maps `[B, H, W, Dv]`. Those of others are `[B, Dv, H, W]`.
MAPS_WITH_FEATURES_LAST = ("edgetam_vision_model", "sam2_hiera_det_model", "sam2_vision_model")
IMAGE_SIZE = 224  # of encoders that read images of any size


class EncoderError(ValueError):
    """Error for a vision encoder that cannot serve.

    Args:
        config: configuration of the encoder.
        reason: the reason, as the end of a sentence.
    """

    def __init__(self, config: PreTrainedConfig, reason: str):
        super().__init__(
            f"A model of the type {config.model_type!r} cannot be the vision encoder of a captioner: {reason}. Use "
            "another one, such as a CLIP, SigLIP, DINOv2, Swin or ConvNeXt."
        )


@strict
class PrecomputedFeaturesConfig(PreTrainedConfig):
    r"""Configuration in the place of a vision encoder's, for a captioner that reads features of any other encoder.

    Args:
        hidden_size (`int`, *optional*, defaults to 768):
            Width of the features.

    Example:

    ```python
    >>> from qformer_captioner import QFormerCaptionerConfig
    >>> config = QFormerCaptionerConfig(vision_config={"model_type": "precomputed_features", "hidden_size": 1280})
    >>> config.qformer_config.encoder_hidden_size, config.has_vision_model
    (1280, False)
    ```
    """

    model_type = "precomputed_features"

    hidden_size: int = 768

    def validate_architecture(self) -> None:
        """Check the width. transformers calls this method on construction and on saving.

        Raises:
            ValueError: if it is less than 1.
        """
        if self.hidden_size < 1:
            raise ValueError(f"`hidden_size` must be at least 1, got {self.hidden_size}.")


# ----------------------------------------------------------------------------------------------------------------------
# From a configuration to an encoder
# ----------------------------------------------------------------------------------------------------------------------


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the vision encoder's part of a configuration (CLIP, SigLIP, LLaVA), or the configuration itself.

    An encoder of masked pretraining (ViT-MAE) is set to keep all patches. By default it drops random ones.
    """
    for name in ("vision_config", "image_config"):  # the latter in FLAVA
        config = getattr(config, name) if name in config.sub_configs else config
    if getattr(config, "mask_ratio", None) is not None:
        config.mask_ratio = 0.0
    if getattr(config, "model_args", None):  # timm: transformers gives the number of classes itself
        config.model_args = {name: value for name, value in config.model_args.items() if name != "num_classes"}
    return config


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the vision encoder that a configuration describes.

    `AutoModel` lacks the vision encoders inside some models, such as BLIP and X-CLIP. In transformers, the class for
    `BlipVisionConfig` is `BlipVisionModel`, in the modeling file beside it.

    Raises:
        EncoderError: if transformers has no such class, or if it needs inputs that image processors do not return.
    """
    model_class: Any = transformers.MODEL_MAPPING.get(type(config), None)
    if model_class is None:
        name = type(config).__name__.removesuffix("Config") + "Model"
        with contextlib.suppress(ModuleNotFoundError):  # some encoders have no modeling file of their own
            modeling = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
            model_class = getattr(modeling, name, None)
    if model_class is None:
        raise EncoderError(config, "transformers has no class for it alone")
    for name, argument in list(inputs_of(model_class).items())[1:]:
        is_needed = argument.default is argument.empty and argument.kind is argument.POSITIONAL_OR_KEYWORD
        if is_needed and name not in ENCODER_INPUTS:
            raise EncoderError(config, f"it needs `{name}` beside images")
    return model_class


def inputs_of(model_class: type[PreTrainedModel]) -> dict[str, inspect.Parameter]:
    """Return the arguments of a model's `forward`."""
    arguments = dict(inspect.signature(model_class.forward).parameters)
    del arguments["self"]
    return arguments


def vision_model_from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a vision encoder with random weights.

    Raises:
        EncoderError: as [`encoder_class`] does.
    """
    return encoder_class(config)._from_config(config, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The width of the features
# ----------------------------------------------------------------------------------------------------------------------


def image_feature_size(config: PreTrainedConfig) -> int:
    """Return the width Dv of the features of a vision encoder.

    Vision transformers have it in their configuration. Other encoders derive it from several fields, each in its own
    way, so it is measured, once for each configuration.

    Raises:
        EncoderError: if the encoder cannot serve; the message names it and the reason.
        ImportError: if the encoder needs a package that is not installed.

    Example:

    ```python
    >>> from transformers import ConvNextConfig
    >>> from qformer_captioner.encoders_qformer import image_feature_size
    >>> image_feature_size(ConvNextConfig())
    768
    ```
    """
    if config.model_type == PrecomputedFeaturesConfig.model_type:
        return config.hidden_size
    model_class, fields = encoder_class(config), config.to_dict()
    known_inputs = {"pixel_values", "pixel_values_videos", *ENCODER_INPUTS, *OPTIONAL_INPUTS}
    is_transformer = (
        type(config) in transformers.MODEL_MAPPING
        and isinstance(fields.get("hidden_size"), int)
        and "patch_size" in fields
        and "output_channels" not in fields  # a convolution after the layers, as in SAM
        and known_inputs.issuperset(inputs_of(model_class))
    )
    if is_transformer:
        return fields["hidden_size"]
    config_class: Any = type(config)  # mypy takes its metaclass for one without a hash
    return measured_feature_size(config_class, config.to_json_string(use_diff=False))


@functools.cache
def measured_feature_size(config_class: type[PreTrainedConfig], fields: str) -> int:
    """Run an encoder with random weights on one image, and return the width of its features.

    The encoder is built on the device "meta", which holds no values. If it needs some, it is built on the CPU.

    Args:
        config_class: class of its configuration.
        fields: the configuration in JSON.

    Raises:
        EncoderError, ImportError: as [`image_feature_size`] does.
    """
    config = config_class.from_dict(json.loads(fields))
    try:
        return feature_size_on(config, "meta")
    except (EncoderError, ImportError):
        raise
    except Exception as error:  # whatever an encoder raises that reads something else than images
        reason = error
    try:
        if "meta" in str(reason):  # "Tensor.item() cannot be called on meta tensors"
            return feature_size_on(config, "cpu")
    except EncoderError:
        raise
    except Exception as error:
        reason = error
    raise EncoderError(config, f"it cannot encode an image ({' '.join(str(reason).split())[:200]})") from reason


def feature_size_on(config: PreTrainedConfig, device: str) -> int:
    """Return the width of the features that a new encoder computes on a device."""
    with torch.device(device), torch.random.fork_rng(devices=[]), torch.no_grad():
        vision_model = vision_model_from_config(config, torch.float32).eval()
        image = torch.zeros(1, getattr(config, "num_channels", 3), *image_size_of(vision_model))
        features, _ = raw_features(vision_model, image)
    return features.shape[channel_dimension(features, vision_model)]


def image_size_of(vision_model: PreTrainedModel) -> tuple[int, int]:
    """Return height and width of the images that an encoder is made for."""
    config: Any = vision_model.config
    if config.model_type == "timm_wrapper":
        timm_model: Any = vision_model.timm_model
        size = (config.model_args or {}).get("img_size", timm_model.pretrained_cfg["input_size"][1:])
    else:
        while getattr(config, "image_size", None) is None and getattr(config, "backbone_config", None) is not None:
            config = config.backbone_config
        size = getattr(config, "image_size", None) or IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


# ----------------------------------------------------------------------------------------------------------------------
# From images to features
# ----------------------------------------------------------------------------------------------------------------------


def reads_videos(config: PreTrainedConfig) -> bool:
    """Return True if an encoder reads videos `[B, F, 3, H, W]` itself, as VideoMAE, ViViT and V-JEPA 2 do."""
    fields = type(config)  # an instance may have other attributes, too
    return getattr(fields, "num_frames", getattr(fields, "frames_per_clip", None)) is not None


def num_frames_of(config: PreTrainedConfig) -> int | None:
    """Return the number of frames that an encoder of videos reads, or `None` for V-JEPA 2, which reads any number.

    The result is `None` for an encoder of images, too.
    """
    return getattr(config, "num_frames", None) if reads_videos(config) else None


def run_encoder(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, ModelOutput]:
    """Run a vision encoder on images.

    Args:
        vision_model (`PreTrainedModel`): the encoder.
        pixel_values (`[B, 3, H, W]`, or what its image processor returns, float): images in its dtype.
        kwargs: those of `ENCODER_INPUTS` that belong to the images, and other arguments of the encoder.

    Returns:
        The features `[B, N, Dv]`, their mask (`[B, N]`, bool; `None` without padding), and the output of the encoder.

    Raises:
        EncoderError: if it returns no sequence of features.
        ValueError: if it does not read one of `ENCODER_INPUTS`.
    """
    config = vision_model.config
    for name in ENCODER_INPUTS:
        if kwargs.get(name) is not None and name not in inputs_of(type(vision_model)):
            raise ValueError(
                f"A vision encoder of the type {config.model_type!r} does not read `{name}`, which an image processor "
                "returns for images of different sizes: use another image processor, or give it images of one size."
            )
    if "interpolate_pos_encoding" not in inputs_of(type(vision_model)):  # it adapts to sizes anyway, or refuses them
        kwargs.pop("interpolate_pos_encoding", None)
    features, output = raw_features(vision_model, pixel_values, **kwargs)
    if features.ndim > 3:
        features = features.movedim(channel_dimension(features, vision_model), -1).flatten(1, -2)
    mask = kwargs.get("pixel_attention_mask")
    number = len(pixel_values)
    if config.model_type == "xclip_vision_model":
        features = features.reshape(number, -1, features.shape[-1])
    elif config.model_type == "pixtral":
        features, mask = split_rows(features[0], number, config.patch_size, kwargs.get("image_sizes"))
    if mask is not None:
        mask = mask.bool()
        mask = None if mask.all() else mask
    return features, mask, output


def raw_features(
    vision_model: PreTrainedModel, pixel_values: torch.Tensor, **kwargs: Any
) -> tuple[torch.Tensor, ModelOutput]:
    """Return features as an encoder returns them, tokens or feature maps, and its output."""
    config = vision_model.config
    if reads_videos(config):
        number = num_frames_of(config)
        if pixel_values.ndim == 4:
            pixel_values = pixel_values.unsqueeze(1)
        if pixel_values.shape[1] == 1 and number is not None:  # an image is a video that stands still
            pixel_values = pixel_values.expand(-1, number, -1, -1, -1)
        if number is not None and pixel_values.shape[1] != number:
            raise ValueError(
                f"A vision encoder of the type {config.model_type!r} reads videos of {number} frames, and not of "
                f"{pixel_values.shape[1]}: give it that many frames, or another `num_frames` in its configuration."
            )
    if config.model_type == "xclip_vision_model":  # reads the frames of a video as rows
        pixel_values = pixel_values.flatten(0, 1)
    elif config.model_type == "vjepa2":  # predicts the features of hidden patches, which nobody needs here
        kwargs["skip_predictor"] = True
    elif config.model_type == "vit_mae":  # sorts the patches by this noise, by default at random
        number = (pixel_values.shape[-2] // config.patch_size) * (pixel_values.shape[-1] // config.patch_size)
        kwargs["noise"] = torch.arange(number, device=pixel_values.device).expand(len(pixel_values), -1)
    output = vision_model(pixel_values, return_dict=True, **kwargs)
    features = output.get("last_hidden_state") if isinstance(output, ModelOutput) else None
    if not isinstance(features, torch.Tensor) or features.ndim < 3:
        raise EncoderError(config, "it returns no sequence of features")
    return features, output


def channel_dimension(features: torch.Tensor, vision_model: PreTrainedModel) -> int:
    """Return the dimension of tokens or feature maps that holds the Dv numbers of a feature."""
    if features.ndim == 3:
        return -1
    is_last = vision_model.config.model_type in MAPS_WITH_FEATURES_LAST
    if vision_model.config.model_type == "timm_wrapper":  # it is the last in the Swin of timm
        width = cast(Any, vision_model).timm_model.num_features
        is_last = features.shape[1] != width == features.shape[-1]
    return -1 if is_last else 1


def split_rows(
    patches: torch.Tensor, number: int, patch_size: int, image_sizes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split the patches of all images into a row for each, and return the padded rows and their mask.

    Args:
        patches (`[N_1 + ... + N_B, Dv]`): features of the patches, image after image.
        number: number of images, B.
        patch_size: side of a patch in pixels.
        image_sizes (`[B, 2]`, long, *optional*): height and width of each image in pixels. By default all are equal.
    """
    if image_sizes is None:
        return patches.unflatten(0, (number, -1)), None
    lengths = (torch.as_tensor(image_sizes) // patch_size).prod(dim=1)
    rows = nn.utils.rnn.pad_sequence(list(patches.split(lengths.tolist())), batch_first=True)
    positions = torch.arange(rows.shape[1], device=patches.device)
    return rows, positions < lengths.to(patches.device)[:, None]
