"""The pretrained models on both sides of the Q-Former: a vision encoder and a language model.

This file loads a backbone from the Hub, from a folder or from a BLIP-2 checkpoint, and quantises it. saving_qformer.py
decides whether a captioner saves the weights of a backbone or keeps it by reference.
"""

import copy
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationDelete, HfApi
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
CAPTIONERS = ("blip-2", "instructblip")  # model types of transformers whose backbones have the same two names
MAX_LAYERS = 1000

# ----------------------------------------------------------------------------------------------------------------------
# Properties of a module
# ----------------------------------------------------------------------------------------------------------------------


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


def first_row_and_column(weight: torch.Tensor) -> torch.Tensor:
    """Return the first column and the first row of a weight `[R, ...]` as one vector on the CPU."""
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach().flatten()[None]
    return torch.cat([rows[:, :1].flatten(), rows[:1].flatten()]).cpu()


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return the weights that share their memory with another weight, mapped to the name of that weight.

    Only weights that transformers can tie are listed. The configuration is not asked, because the output layer may have
    been replaced, trained or tied after the model was built.

    Args:
        model (`nn.Module`): language model, or captioner that contains one.

    Example:

    ```python
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from qformer_captioner.backbones_qformer import ties_of
    >>> ties_of(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=12)))
    {'lm_head.weight': 'transformer.wte.weight'}
    ```
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    ties = {}
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for target, source in (module._tied_weights_keys or {}).items():
                names = [f"{prefix}.{name}" if prefix else name for name in (target, source)]
                if all(name in weights for name in names) and share_memory(*(weights[name] for name in names)):
                    ties[names[0]] = names[1]
    return ties


def share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return True if two weights are the same values in memory.

    Weights that are offloaded or sharded have no address, and are compared by identity.
    """
    return first is second or (first.data_ptr() == second.data_ptr() != 0 and first.shape == second.shape)


def forget_broken_ties(model: nn.Module) -> None:
    """Make `tie_weights()` tie only the weights that are tied now.

    The Trainer, FSDP and `resize_token_embeddings` call it. In an encoder-decoder model the configuration cannot say
    that the output layer is not tied, because the embeddings of encoder and decoder still are.
    """
    ties = ties_of(model)
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            for name in module.get_expanded_tied_weights_keys():  # none if the configuration does not tie them
                if (f"{prefix}.{name}" if prefix else name) not in ties:
                    forget_tie(module, name)


def forget_tie(model: PreTrainedModel, name: str) -> None:
    """Make `tie_weights()` leave one weight of a model alone."""
    model._tied_weights_keys = {
        target: source for target, source in (model._tied_weights_keys or {}).items() if target != name
    }
    model.all_tied_weights_keys.pop(name, None)


class VisionModelPlaceholder(nn.Module):
    """Placeholder for the vision encoder when training on precomputed features; holds no weights.

    Args:
        config (`PreTrainedConfig`): configuration of the vision encoder.
        dtype (`torch.dtype`): dtype that the vision encoder would have.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype | None):
        super().__init__()
        self.config = config
        self.nothing = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)  # keeps dtype and device

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "This captioner was loaded without its vision encoder and reads precomputed features (`image_embeds`). To "
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
            vision_config = vision_config_of(config)
            backbone = AutoModel.from_pretrained(name_or_path, config=vision_config, dtype=dtype, **download)
    except (OSError, SafetensorError) as error:
        raise loading_error(part, name_or_path, revision, error) from error
    backbone.config.name_or_path = os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else name_or_path
    return backbone


def placeholder_for(config: PreTrainedConfig, dtype: str | torch.dtype | None) -> VisionModelPlaceholder:
    """Return a placeholder for the vision encoder of a configuration."""
    if dtype == "auto":
        dtype = config.dtype or torch.get_default_dtype()
    return VisionModelPlaceholder(config, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


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
        backbone = vision_model_from_config(blip2_vision_config(config.vision_config), dtype)
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
        f"A captioner saved with `include_backbones=True` does not need it. ({reason})"
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


def vision_config_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the vision encoder's part of a configuration (CLIP, SigLIP, BLIP-2), or the configuration itself."""
    if config.model_type in CAPTIONERS:
        return blip2_vision_config(config.vision_config)
    return config.vision_config if "vision_config" in config.sub_configs else config


def blip2_vision_config(config: PreTrainedConfig) -> Blip2VisionConfig:
    """Return the configuration of a BLIP-2 or InstructBLIP vision encoder, which are the same model."""
    return Blip2VisionConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})


def vision_model_from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a vision encoder with random weights. `AutoModel` does not support the vision encoder of BLIP-2."""
    if config.model_type == Blip2VisionConfig.model_type:
        return Blip2VisionModel._from_config(config, dtype=dtype)
    return AutoModel.from_config(config, dtype=dtype)


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


# ----------------------------------------------------------------------------------------------------------------------
# Weights in safetensors files
# ----------------------------------------------------------------------------------------------------------------------


def weights_name(variant: str | None = None, index: bool = False) -> str:
    """Return the name of the file with all weights, or of the index of a sharded file.

    Example:

    ```python
    >>> from qformer_captioner.backbones_qformer import weights_name
    >>> weights_name(), weights_name("fp16", index=True)
    ('model.safetensors', 'model.safetensors.index.fp16.json')
    ```
    """
    name = SAFE_WEIGHTS_INDEX_NAME if index else SAFE_WEIGHTS_NAME
    start, end = name.rsplit(".", 1)
    return name if variant is None else f"{start}.{variant}.{end}"


def weight_files(path: str | os.PathLike, variant: str | None = None, **hub_kwargs: Any) -> list[str]:
    """Return the paths of the safetensors files of a folder or Hub repository, sharded or not.

    A file with all weights precedes an index, as in transformers.

    Raises:
        OSError: if no file exists, or if the index is damaged or names files outside its folder.
    """
    optional = {"_raise_exceptions_for_missing_entries": False, **hub_kwargs}
    whole = cached_file(path, weights_name(variant), **optional)
    if whole is not None:
        return [whole]
    index = cached_file(path, weights_name(variant, index=True), **optional)
    if index is None:
        return [fetch_file(path, weights_name(variant), **hub_kwargs)]
    try:
        with open(index, encoding="utf-8") as file:
            names = set(json.load(file)["weight_map"].values())
        outside = [name for name in names if name != os.path.basename(name) or not name.endswith(".safetensors")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OSError(f"{index!r} is not a valid index of weights ({error}). Fetch it again.") from error
    if outside or not names:
        wrong = outside[0] if outside else "nothing"
        raise OSError(f"{index!r} is not a valid index of weights: it names {wrong!r}. Fetch it again.")
    return [fetch_file(path, name, **hub_kwargs) for name in sorted(names)]


@contextmanager
def replacing_weights(folder: str | os.PathLike, variant: str | None = None) -> Iterator[None]:
    """Leave a folder with one reading after a `with` block in which transformers saves a model there.

    transformers keeps the index of earlier shards and an earlier file with all weights, so that old weights could be
    read. It also deletes the shards of other variants.

    Args:
        folder: folder to which the model is saved.
        variant: variant of the weights that is saved.
    """
    whole, index = (Path(folder, weights_name(variant, index)) for index in (False, True))
    others = Path(folder).glob("model.*-?????-of-?????.safetensors") if variant is None else ()
    # transformers does not touch hidden files.
    aside = {file: file.with_name(f".{file.name}") for file in (index, *others) if file.is_file()}
    for file, hidden in aside.items():
        file.replace(hidden)
    try:
        yield
        if index.exists():
            whole.unlink(missing_ok=True)
        if index in aside and (index.exists() or whole.exists()):  # and not only an adapter was saved
            aside.pop(index).unlink()
    finally:
        for file, hidden in aside.items():
            hidden.replace(file)


def replaced_weights(written: Collection[str], existing: Iterable[str]) -> list[str]:
    """Return the files of a repository whose weights were replaced by an upload.

    Args:
        written: names of the files that were uploaded.
        existing: names of the files that the repository has.
    """
    pattern = re.compile(
        r"model(?:\.(.+?))?(?:-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(?:\.(.+))?\.json"
    )
    variant_of = {name: match[1] or match[2] for name in existing if (match := pattern.fullmatch(name))}
    return [
        name
        for name, variant in variant_of.items()
        if name not in written and {weights_name(variant), weights_name(variant, index=True)} & set(written)
    ]


def delete_replaced_weights(repo_id: str, written: Collection[str], revision: str | None, token: Any) -> None:
    """Delete the weights that an upload replaced, in a second commit, because transformers makes the first."""
    api = HfApi(token=token)
    if replaced := replaced_weights(written, api.list_repo_files(repo_id, revision=revision)):
        deletions = [CommitOperationDelete(name) for name in replaced]
        api.create_commit(repo_id, deletions, commit_message="Delete replaced weights", revision=revision)


def fetch_file(path: str | os.PathLike, name: str, **hub_kwargs: Any) -> str:
    """Return the local path of one file of a folder or Hub repository.

    Raises:
        OSError: if the file does not exist or cannot be fetched.
    """
    file = cached_file(path, name, **hub_kwargs)
    if file is None:
        raise OSError(f"{os.fspath(path)!r} has no file {name!r}. Fetch it again.")
    return file


def open_weights(file: str) -> safe_open:
    """Open a safetensors file.

    Raises:
        OSError: if the file is damaged or not in this format.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise OSError(
            f"{file!r} is not a complete safetensors file, it may have been cut off ({error}). Fetch it again."
        ) from error


def read_weights(path: str | os.PathLike, prefix: str = "", **hub_kwargs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder or Hub repository, sharded or not, whose names begin with `prefix`.

    Raises:
        OSError: if a file is missing or damaged.
    """
    weights = {}
    for file in weight_files(path, **hub_kwargs):
        with open_weights(file) as tensors:
            weights.update({name: tensors.get_tensor(name) for name in tensors.keys() if name.startswith(prefix)})  # noqa: SIM118
    return weights


def count_weights(path: str | os.PathLike, **hub_kwargs: Any) -> int:
    """Return the number of elements of all tensors, read from the headers of the safetensors files.

    Raises:
        OSError: if a file is missing or damaged.
    """
    total = 0
    for file in weight_files(path, **hub_kwargs):
        with open_weights(file) as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total
