"""The frozen models on both sides of the Q-Former: fetched from the Hub or a folder, or taken out of another captioner.

A captioner keeps them by name or holds their weights (saving_qformer.py), so this is what its loading rests on.
"""

import copy
import json
import math
import os

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_qformer import is_hub_id

BACKBONES = ("vision_model", "language_model")
MOST_LAYERS = 1000
CAPTIONERS = ("blip-2", "instructblip")  # of transformers; their parts can be ours


def is_frozen(module: nn.Module) -> bool:
    """Whether none of its parameters trains."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of its floating-point weights."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


class VisionModelPlaceholder(nn.Module):
    """Stands in the place of a vision encoder where its features come precomputed, and takes no memory."""

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.nothing = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)  # tells the dtype it would have

    def forward(self, *args, **kwargs):
        raise ValueError(
            "This captioner was loaded without its vision encoder and reads precomputed features (`image_embeds`). To "
            "show it images, call its `load_vision_model()` first."
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether transformers put its layers into fewer bits; a model that is not has no such attribute."""
    return getattr(module, "is_quantized", False)


def load_backbone(
    part: str,
    name_or_path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    absent: bool = False,
    **hub_kwargs,
) -> PreTrainedModel | VisionModelPlaceholder:
    """Load a vision encoder (`part="vision_model"`) or a language model from the Hub or a folder.

    With `absent`, only the configuration of the vision encoder is fetched.

    Raises:
        OSError: if it cannot be fetched; the message names it and says what to do.
    """
    try:
        # No code but ours and transformers' is run for a backbone, whatever its folder brings.
        config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False, **hub_kwargs)
        check_layers(config)
        if absent:
            config = vision_config_of(config)
            dtype = config.dtype or torch.get_default_dtype() if dtype == "auto" else dtype
            backbone = VisionModelPlaceholder(config, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        elif config.model_type in CAPTIONERS:
            backbone = load_part_of_captioner(part, name_or_path, config, revision, dtype, **hub_kwargs)
        elif part == "language_model":
            auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            if not config.is_encoder_decoder and vars(config).get("is_decoder") is False:
                config.is_decoder = True  # or a BERT would see the words that it is to write
            backbone = auto_class.from_pretrained(
                name_or_path, config=config, revision=revision, dtype=dtype, **hub_kwargs
            )
        else:
            backbone = AutoModel.from_pretrained(
                name_or_path, config=vision_config_of(config), revision=revision, dtype=dtype, **hub_kwargs
            )
    except (OSError, SafetensorError) as error:
        raise cannot_load(part, name_or_path, revision, error) from error
    backbone.config.name_or_path = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
    return backbone


def one_device(device_map: str | int | torch.device | dict | None) -> str | int | torch.device | None:
    """The device that a `device_map` is about; `None` where it leaves the choice to others.

    Raises:
        ValueError: if it is about several.
    """
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            "With `quantization_config` all of a captioner is on one device: give that as `device_map`, such as "
            f'"cuda:0", or "auto", and not {device_map}.'
        )
    return None if devices & {"auto", "balanced", "balanced_low_0", "sequential"} else devices.pop()


def quantize(
    language_model: PreTrainedModel,
    quantization_config: BitsAndBytesConfig,
    device: str | int | torch.device | None = None,
) -> PreTrainedModel:
    """The same language model with its linear layers in 4 or 8 bits; by default on the GPU, where there is one.

    Words and output layer stay as they are, and so does whatever else transformers leaves alone (T5's `wo`).

    Raises:
        ImportError: if bitsandbytes is not there.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError as error:
        raise ImportError("Quantisation needs bitsandbytes: pip install 'qformer-captioner[qlora]'.") from error
    config = copy.deepcopy(language_model.config)
    quantized = type(language_model).from_pretrained(
        None,
        config=config,
        state_dict=language_model.state_dict(),
        dtype=dtype_of(language_model),
        quantization_config=quantization_config,
        device_map=None if device is None else {"": device},
    )
    # Folders say nothing of it: what is saved are names and adapters, and whoever loads them quantises anew or not.
    del quantized.config.quantization_config
    quantized.config.name_or_path = config.name_or_path
    quantized.generation_config = language_model.generation_config
    untie_t5_head(quantized)
    for module in quantized.modules():
        if isinstance(module, Linear4bit):
            # In evaluation bitsandbytes would repack the weights for this kind of CPU, and from then on gradients would
            # end there without a word (bitsandbytes 0.50).
            module.support_avx512bf16_for_cpu = False
    return quantized


def cannot_load(part: str, name_or_path: str, revision: str | None, error: Exception) -> OSError:
    """What to tell somebody whose backbone is neither on the Hub, as far as it can be reached, nor in the cache."""
    what = f"The {part.replace('_', ' ')} {name_or_path!r} (revision {revision or 'main'}) could not be loaded"
    remedy = "check the name or put the folder back"
    if is_hub_id(name_or_path):
        at = f" --revision {revision}" if revision else ""
        remedy = (
            f"check the name, log in with `hf auth login` if it is private or gated, and where the Hub can be reached, "
            f"fetch it into the cache with `hf download {name_or_path}{at}`"
        )
    why = " ".join(str(error).split())[:300]
    return OSError(f"{what}: {remedy}. A captioner saved with `include_backbones=True` does not need it. ({why})")


def weight_files(path: str | os.PathLike, **hub_kwargs) -> list[str]:
    """The safetensors files of a folder or Hub repository, sharded or not.

    Raises:
        OSError: if there are none, or the index names files that are not beside it.
    """
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if index is None:
        return [cached_file(path, SAFE_WEIGHTS_NAME, **hub_kwargs)]
    try:
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        outside = [name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index!r} is no index of weights ({error}). Fetch it again.") from error
    if outside or not names:
        raise OSError(f"{index!r} is no index of weights: it names {outside[0] if outside else 'nothing'!r}.")
    return [cached_file(path, name, **hub_kwargs) for name in sorted(names)]


def read_weights(
    path: str | os.PathLike, prefix: str = "", revision: str | None = None, **hub_kwargs
) -> dict[str, torch.Tensor]:
    """The tensors of a folder or Hub repository, sharded or not, whose names begin with `prefix`.

    Raises:
        OSError: if a file is missing or cut off.
    """
    weights = {}
    for file in weight_files(path, revision=revision, **hub_kwargs):
        with open_weights(file) as tensors:
            weights.update({name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)})  # noqa: SIM118
    return weights


def open_weights(file: str) -> safe_open:
    """Open a safetensors file.

    Raises:
        OSError: if it is none, or cut off.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"{file!r} is no whole safetensors file, it may have been cut off ({error}). Fetch it again."
        ) from error


def number_of_weights(path: str | os.PathLike, **hub_kwargs) -> int:
    """How many numbers the safetensors files hold, by their headers.

    Raises:
        OSError: if a file is missing or cut off.
    """
    total = 0
    for file in weight_files(path, **hub_kwargs):
        with open_weights(file) as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def check_layers(config: PreTrainedConfig) -> None:
    """Refuse a configuration that would take hours to build, before anything is.

    Raises:
        OSError: if it asks for more than a thousand layers of anything.
    """
    configs = [config.to_dict()]
    while configs:
        for name, value in configs.pop().items():
            if isinstance(value, dict):
                configs.append(value)
            elif "layer" in str(name) and isinstance(value, int) and value > MOST_LAYERS:
                raise OSError(f"A configuration with `{name}` {value} cannot be used: the most are {MOST_LAYERS}.")


def load_part_of_captioner(
    part: str,
    name_or_path: str,
    config: PreTrainedConfig,
    revision: str | None,
    dtype: str | torch.dtype,
    **hub_kwargs,
) -> PreTrainedModel:
    """A backbone out of a BLIP-2 or InstructBLIP of transformers, whose parts have the same names as ours."""
    weights = read_weights(name_or_path, f"{part}.", revision, **hub_kwargs)
    weights = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items()}
    if dtype == "auto":
        dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    if part == "vision_model":
        backbone = vision_model_from_config(blip2_vision_config(config.vision_config), dtype)
    else:
        auto_class = AutoModelForSeq2SeqLM if config.text_config.is_encoder_decoder else AutoModelForCausalLM
        backbone = auto_class.from_config(config.text_config, dtype=dtype)
        untie_t5_head(backbone)
        if "shared.weight" in weights:  # a T5 that had its output layer tied in memory saved one tensor for both
            weights.setdefault("lm_head.weight", weights["shared.weight"])
    missing, _ = backbone.load_state_dict(weights, strict=False)
    if missing := sorted(set(missing) - set(backbone.all_tied_weights_keys)):
        raise OSError(f"{name_or_path!r} has no {missing[0]!r} in its {part}.")
    return backbone


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the vision encoder in whatever it is a part of (CLIP, SigLIP, BLIP-2), or it itself."""
    if config.model_type in CAPTIONERS:
        return blip2_vision_config(config.vision_config)
    return config.vision_config if "vision_config" in config.sub_configs else config


def blip2_vision_config(config: PreTrainedConfig) -> Blip2VisionConfig:
    """The vision encoder of a BLIP-2 or InstructBLIP: they are the same."""
    return Blip2VisionConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})


def commit_of(name_or_path: str | os.PathLike, revision: str | None) -> str | None:
    """The commit of the Hub that a model came from, read off the cache; `None` for a plain folder."""
    return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, revision=revision), None)


def vision_model_from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A vision encoder with random weights. `AutoModel` does not know BLIP-2's own, which its captioners come with."""
    if config.model_type == Blip2VisionConfig.model_type:
        return Blip2VisionModel._from_config(config, dtype=dtype)
    return AutoModel.from_config(config, dtype=dtype)


def untie_t5_head(language_model: PreTrainedModel) -> None:
    """Keep the output layer of T5 v1.1 and Flan-T5 their own.

    These models have one, and the only trace of it is `scale_decoder_outputs=False`: transformers 5 declares all T5
    output layers tied to the input embedding, so that a later `tie_weights()` (Trainer and FSDP call it) would silently
    overwrite it.
    """
    if getattr(language_model.config, "scale_decoder_outputs", True):
        return
    language_model._tied_weights_keys = {
        name: source for name, source in language_model._tied_weights_keys.items() if name != "lm_head.weight"
    }
    language_model.all_tied_weights_keys.pop("lm_head.weight", None)
    if language_model.lm_head.weight is language_model.shared.weight:
        language_model.lm_head.weight = nn.Parameter(language_model.shared.weight.detach().clone())
