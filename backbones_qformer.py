"""The pretrained models on both sides of the Q-Former: a vision encoder and a language model.

This file loads a backbone from the Hub, from a folder or from a BLIP-2 checkpoint, and quantises it. saving_qformer.py
decides whether a folder has the weights of a backbone or keeps it by reference.
"""

import copy
import os
import re
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from .configuration_qformer import is_hub_id
from .encoders_qformer import (
    PrecomputedFeaturesConfig,
    encoder_class,
    image_feature_size,
    vision_config_of,
    vision_model_from_config,
)
from .weights_qformer import forget_tie, read_shapes, read_weights

BACKBONES = ("vision_model", "language_model")  # of a captioner
CAPTIONERS = ("blip-2", "instructblip")  # model types of transformers whose backbones have the same two names
MAX_LAYERS = 1000

# ----------------------------------------------------------------------------------------------------------------------
# Properties of a module
# ----------------------------------------------------------------------------------------------------------------------


def without_compiler(module: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile`; any other module is returned unchanged."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def is_frozen(module: nn.Module) -> bool:
    """Return True if no parameter of the module receives gradients."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def is_quantized(module: nn.Module) -> bool:
    """Return True if transformers quantised the module. Only quantised models have the attribute `is_quantized`."""
    return getattr(module, "is_quantized", False)


def embedding_weights(language_model: PreTrainedModel) -> torch.Tensor:
    """Return the input embeddings of a language model, `[V, D]`."""
    weights = language_model.get_input_embeddings().weight
    assert isinstance(weights, torch.Tensor)
    return weights


class VisionModelPlaceholder(nn.Module):
    """Placeholder for the vision encoder of a model that reads precomputed features; holds no weights.

    Args:
        config (`PreTrainedConfig`): configuration of the vision encoder, or of features without one.
        dtype (`torch.dtype`): dtype that the vision encoder would have.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None):
        super().__init__()
        self.config = config
        self.nothing = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)  # keeps dtype and device

    def forward(self, *args: Any, **kwargs: Any) -> None:
        if self.config.model_type == PrecomputedFeaturesConfig.model_type:
            raise ValueError(
                "This model was trained on features and has no vision encoder for images: pass features of the "
                f"width {self.config.hidden_size} as `image_embeds`."
            )
        raise ValueError(
            "This model was loaded without its vision encoder and reads precomputed features (`image_embeds`). To "
            "show it images, call its `load_vision_model()` first."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Fetching a backbone
# ----------------------------------------------------------------------------------------------------------------------


def load_backbone(
    part: str,
    name_or_path: str,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "auto",
    load_weights: bool = True,
    **hub_kwargs: Any,
) -> PreTrainedModel | VisionModelPlaceholder:
    """Load a backbone from the Hub or a folder. No code of the repository is executed.

    Args:
        part (`str`): `"vision_model"` or `"language_model"`.
        name_or_path (`str`): Hub id or folder of a vision encoder, a two-tower model (CLIP, SigLIP), a language model,
            or a BLIP-2 or InstructBLIP that holds the backbone.
        revision (`str`, *optional*): branch, tag or commit.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): `"auto"` is the dtype of the saved weights.
        load_weights (`bool`, defaults to `True`): `False` returns a placeholder for the vision encoder.
        hub_kwargs: `cache_dir`, `force_download`, `local_files_only` and `token` of `from_pretrained`.

    Returns:
        The backbone, whose `config.name_or_path` is the Hub id or the absolute path.

    Raises:
        OSError: if the backbone cannot be fetched; the message names it and the remedy.

    Example:

    ```python
    >>> load_backbone("language_model", "openai-community/gpt2").config.vocab_size  # doctest: +SKIP
    50257
    ```
    """
    download = {"revision": revision, **hub_kwargs}
    backbone: PreTrainedModel | VisionModelPlaceholder
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **download)
        check_number_of_layers(config)
        if not load_weights:
            backbone = placeholder_for(vision_config_of(config), dtype)
        elif config.model_type in CAPTIONERS:
            backbone = load_backbone_of_captioner(part, name_or_path, config, dtype, **download)
        elif part == "language_model":
            backbone = load_language_model(name_or_path, config, dtype, **download)
        else:
            backbone = load_vision_model(name_or_path, config, dtype, **download)
    except (OSError, SafetensorError) as error:
        raise loading_error(part, name_or_path, revision, error) from error
    backbone.config.name_or_path = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
    return backbone


def placeholder_for(config: PreTrainedConfig, dtype: str | torch.dtype | None) -> VisionModelPlaceholder:
    """Return a placeholder for the vision encoder of a configuration."""
    if dtype == "auto":
        dtype = config.dtype or torch.get_default_dtype()
    return VisionModelPlaceholder(config, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def vision_model_or_width(
    vision: str | os.PathLike | None,
    encoder_hidden_size: int | None,
    revision: str | None,
    dtype: str | torch.dtype,
    load_weights: bool,
) -> PreTrainedModel | VisionModelPlaceholder:
    """Return a pretrained vision encoder, or a placeholder of one that is unknown but for the width of its features.

    Raises:
        OSError: if the encoder cannot be fetched; the message names it.
        TypeError: if there is neither an encoder nor a width, or both.
    """
    if vision is not None and encoder_hidden_size is None:
        return load_backbone("vision_model", os.fspath(vision), revision, dtype, load_weights=load_weights)
    if vision is None and encoder_hidden_size is not None:
        return placeholder_for(PrecomputedFeaturesConfig(hidden_size=encoder_hidden_size), dtype)
    raise TypeError(
        "Pass either a vision encoder as `vision`, or `vision=None` and `encoder_hidden_size`, the width of the "
        "features that another encoder computes."
    )


def load_vision_model(
    name_or_path: str, config: PreTrainedConfig, dtype: str | torch.dtype | None, **download: Any
) -> PreTrainedModel:
    """Load a vision encoder, which may be a part of a larger model.

    Raises:
        OSError: if the checkpoint lacks most weights of the encoder.
        ValueError: if the encoder cannot serve.
    """
    vision_config = vision_config_of(config)
    image_feature_size(vision_config)  # refuses an encoder that cannot serve
    model_class = encoder_class(vision_config)
    options: dict[str, Any] = dict(config=vision_config, dtype=dtype, **download)
    if vision_config is not config:
        prefix = prefix_of_encoder(model_class, vision_config, name_or_path, **download)
        if prefix != model_class.base_model_prefix:  # which transformers removes itself
            options["key_mapping"] = {rf"^{re.escape(prefix)}\.": ""}
    loaded: Any = model_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    model, info = loaded
    if len(info["missing_keys"]) > len(model.state_dict()) / 2:  # a few may be: a pooler, a token of pretraining
        raise OSError(
            f"it has no weights of the vision encoder {vision_config.model_type!r} under the names of transformers, "
            f"such as {min(info['missing_keys'])!r}"
        )
    return model


def prefix_of_encoder(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, name_or_path: str, **download: Any
) -> str:
    """Return the beginning of the names of a vision encoder's weights in a larger model, such as "vision_tower"."""
    with torch.device("meta"):
        own = model_class._from_config(config).state_dict()
    # Only a vision encoder has convolutions. Its layers may have the names of those of the language model.
    anchor = next((name for name, weight in own.items() if weight.ndim > 3), next(iter(own)))
    names = read_shapes(name_or_path, **download)
    prefixes = [name.removesuffix(f".{anchor}") for name in names if name.endswith(f".{anchor}")]
    if not prefixes:
        return model_class.base_model_prefix
    return max(prefixes, key=lambda prefix: sum(f"{prefix}.{name}" in names for name in own))


def load_language_model(
    name_or_path: str, config: PreTrainedConfig, dtype: str | torch.dtype | None, **download: Any
) -> PreTrainedModel:
    """Load a decoder-only or encoder-decoder language model."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM.from_pretrained(name_or_path, config=config, dtype=dtype, **download)
    if vars(config).get("is_decoder") is False:
        config.is_decoder = True  # otherwise a BERT would attend to the tokens that it has to predict
    return AutoModelForCausalLM.from_pretrained(name_or_path, config=config, dtype=dtype, **download)


def load_backbone_of_captioner(
    part: str, name_or_path: str, config: PreTrainedConfig, dtype: str | torch.dtype | None, **download: Any
) -> PreTrainedModel:
    """Load a backbone from a BLIP-2 or InstructBLIP checkpoint of transformers.

    Raises:
        OSError: if the checkpoint lacks a weight of the backbone.
    """
    weights = read_weights(name_or_path, f"{part}.", **download)
    weights = {name.removeprefix(f"{part}."): tensor for name, tensor in weights.items()}
    if dtype is None or isinstance(dtype, str):
        saved = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        dtype = saved if dtype == "auto" else getattr(torch, dtype or "float32")
    if part == "vision_model":
        backbone = vision_model_from_config(vision_config_of(config), dtype)
    else:
        backbone = language_model_from_config(config.text_config, dtype)
        if "shared.weight" in weights:  # a T5 whose output layer was tied in memory saved one tensor for both
            weights.setdefault("lm_head.weight", weights["shared.weight"])
    missing, _ = backbone.load_state_dict(weights, strict=False)
    if missing := sorted(set(missing) - set(backbone.all_tied_weights_keys)):
        raise OSError(f"{name_or_path!r} has no {missing[0]!r} in its {part}.")
    return backbone


def loading_error(part: str, name_or_path: str, revision: str | None, error: Exception) -> OSError:
    """Return the error for a backbone that is neither in the cache nor can be fetched, with the remedy."""
    remedy = "check the name or put the folder back"
    if is_hub_id(name_or_path):
        option = f" --revision {revision}" if revision else ""
        remedy = (
            "check the name, log in with `hf auth login` if it is private or gated, and where the Hub can be reached, "
            f"fetch it into the cache with `hf download {name_or_path}{option}`"
        )
    reason = " ".join(str(error).split())[:300]
    return OSError(
        f"The {part.replace('_', ' ')} {name_or_path!r} (revision {revision or 'main'}) could not be loaded: {remedy}. "
        f"A model saved with `include_backbones=True` does not need it. ({reason})"
    )


def commit_of(name_or_path: str | os.PathLike, revision: str | None) -> str | None:
    """Return the commit of a model in the Hub cache, or `None` for a plain folder."""
    return extract_commit_hash(cached_file(name_or_path, CONFIG_NAME, revision=revision), None)


# ----------------------------------------------------------------------------------------------------------------------
# Configurations and models without weights
# ----------------------------------------------------------------------------------------------------------------------


def check_number_of_layers(config: PreTrainedConfig) -> None:
    """Refuse a configuration that would take hours to build.

    Raises:
        OSError: if any field asks for more than a thousand layers.
    """
    configs = [config.to_dict()]
    while configs:
        for name, value in configs.pop().items():
            if isinstance(value, dict):
                configs.append(value)
            elif "layer" in str(name) and isinstance(value, int) and value > MAX_LAYERS:
                raise OSError(
                    f"The configuration sets `{name}` to {value}, but at most {MAX_LAYERS} are supported. Fetch it "
                    "again or correct its `config.json`."
                )


def language_model_from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a language model with random weights."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    language_model = auto_class.from_config(config, dtype=dtype)
    untie_t5_head(language_model)
    return language_model


def untie_t5_head(language_model: PreTrainedModel) -> None:
    """Untie the output layer of T5 v1.1 and Flan-T5 from the input embedding. Do nothing to other models.

    These models were trained with an untied output layer. Since huggingface/transformers#42815, `T5Config` forces
    `tie_word_embeddings=True` and keeps the original value as `scale_decoder_outputs=False`. `tie_weights()`, which the
    Trainer and FSDP call, would therefore silently replace the output layer with the input embedding.
    """
    if getattr(language_model.config, "scale_decoder_outputs", True):
        return
    forget_tie(language_model, "lm_head.weight")
    head, embedding = language_model.get_output_embeddings(), language_model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone())


# ----------------------------------------------------------------------------------------------------------------------
# Quantisation
# ----------------------------------------------------------------------------------------------------------------------


def bits_and_bytes_config(quantization_config: BitsAndBytesConfig | dict[str, Any]) -> BitsAndBytesConfig:
    """Return a configuration for 4 or 8 bits, which may be given as a dictionary.

    Raises:
        ValueError: if it is of another kind, or names neither 4 nor 8 bits.

    Example:

    ```python
    >>> from qformer_captioner.backbones_qformer import bits_and_bytes_config
    >>> bits_and_bytes_config({"load_in_4bit": True}).load_in_4bit
    True
    ```
    """
    config = quantization_config
    if isinstance(config, dict):
        config = BitsAndBytesConfig.from_dict(config)
    if not isinstance(config, BitsAndBytesConfig) or not (config.load_in_4bit or config.load_in_8bit):
        raise ValueError(
            "`quantization_config` must be a `BitsAndBytesConfig` or a dictionary with `load_in_4bit=True` or "
            f"`load_in_8bit=True`, not {str(quantization_config)[:200]}."
        )
    return config


def quantize(
    language_model: PreTrainedModel,
    quantization_config: BitsAndBytesConfig,
    device: str | int | torch.device | None = None,
) -> PreTrainedModel:
    """Return a copy of a language model whose linear layers are quantised to 4 or 8 bits.

    The input embedding, the output layer and the layers that transformers excludes (T5's `wo`) keep their dtype.

    Args:
        language_model (`PreTrainedModel`): model in a floating-point dtype.
        quantization_config (`BitsAndBytesConfig`): number of bits and further options.
        device (`str`, `int` or `torch.device`, *optional*): defaults to the GPU, or to the CPU without one.

    Raises:
        ImportError: if bitsandbytes is not installed.
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
    # Saved folders do not record the quantisation, because they keep the language model by reference.
    del quantized.config.quantization_config
    quantized.config.name_or_path = config.name_or_path
    quantized.generation_config = language_model.generation_config
    untie_t5_head(quantized)
    for module in quantized.modules():
        if isinstance(module, Linear4bit):
            keep_gradients_on_cpu(module)
    return quantized


def keep_gradients_on_cpu(layer: Any) -> None:
    """Keep a `Linear4bit` of bitsandbytes differentiable after it was evaluated on a CPU with AVX-512 BF16.

    `Linear4bit.forward` repacks the weights for a fused kernel when it runs in evaluation mode on such a CPU
    (bitsandbytes-foundation/bitsandbytes#1804). The kernel has no backward pass, and gradients end there silently.
    """
    layer.support_avx512bf16_for_cpu = False


def single_device(device_map: str | int | torch.device | dict | None) -> str | int | torch.device | None:
    """Return the device that a `device_map` names, or `None` if it leaves the choice to transformers.

    Raises:
        ValueError: if the map names more than one device, or offloads to disk.
    """
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) > 1 or "disk" in devices:
        raise ValueError(
            "A quantised captioner must be on one device: give that as `device_map`, such as "
            f'"cuda:0", or "auto", and not {device_map}.'
        )
    return None if devices & {"auto", "balanced", "balanced_low_0", "sequential"} else devices.pop()
