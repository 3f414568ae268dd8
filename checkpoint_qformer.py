"""The Q-Former inside a checkpoint of another model, found by the names of its tensors, and whole models of BLIP-2.

BLIP-2, InstructBLIP and Granite Speech have a `Blip2QFormerModel`, or a module with the same parameters, at different
places. Its query tokens are a parameter beside it. A BERT has the layers of a Q-Former without queries.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .backbones_qformer import check_number_of_layers, commit_of, placeholder_for
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig, QFormerPretrainingConfig
from .processing_qformer import HUB_KWARGS
from .weights_qformer import read_shapes, read_weights

logger = logging.get_logger(__name__)

# Each Q-Former has cross-attention in its first layer, under this name.
FIRST_LAYER = re.compile(r"^(.*?)encoder\.layer\.0\.crossattention\.attention\.key\.weight$")
# Names of the parameters of a `QFormerModel`
PARAMETERS = ("encoder.", "layernorm.", "embeddings.", "query_tokens", "frame_embeddings", "feature_norm.")
TEXT_PART = re.compile(r"^embeddings\.|\.\d+\.(intermediate|output)\.")
WORDS = "embeddings.word_embeddings.weight"
SHOWN_NAMES = 4


class StoredQFormer(NamedTuple):
    """Q-Former inside a checkpoint.

    Attributes:
        fields: fields of its [`QFormerConfig`].
        names: the name in the checkpoint of each tensor of a [`QFormerModel`].
    """

    fields: dict[str, Any]
    names: dict[str, str]


def find_qformer(
    source: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], module_name: str | None = None
) -> StoredQFormer:
    """Return the Q-Former inside a checkpoint. That of pretraining comes without its text part, unless asked for.

    Args:
        source: folder or Hub id of the checkpoint, for messages.
        config: its configuration, with those of its parts.
        shapes: the shapes of its tensors by their names.
        module_name: name of the Q-Former's module, such as `"projector.qformer"`, if there are several.

    Raises:
        ValueError: if there is no Q-Former, or no configuration for it, or if there are several and none is named.

    Example:

    ```python
    >>> shapes = {"projector.qformer.encoder.layer.0.crossattention.attention.key.weight": (32, 24)}
    >>> shapes["projector.query"] = (1, 3, 32)
    >>> config = {"window_size": 15, "projector_config": {"model_type": "blip_2_qformer", "hidden_size": 32}}
    >>> found = find_qformer("granite", config, shapes)
    >>> found.fields["num_query_tokens"], found.fields["window_size"], found.names["query_tokens"]
    (3, 15, 'projector.query')
    ```
    """
    if config.get("model_type") == "bert":
        names = names_in_bert(shapes)
        fields = {name: config[name] for name in QFormerConfig.field_names() if name in config}
        return StoredQFormer(fields | {"use_qformer_text_input": WORDS in names}, names)
    prefix = prefix_of_qformer(source, config, shapes, module_name)
    names = {}
    for name in shapes:
        ours = name.removeprefix(prefix).replace("embeddings.layernorm.", "layernorm.")  # InstructBLIP
        if name.startswith(prefix) and ours.startswith(PARAMETERS) and not ours.endswith(".position_ids"):
            names[ours] = name
    hidden_size, _ = shapes[names["encoder.layer.0.crossattention.attention.key.weight"]]
    parent = prefix.removesuffix(".").rpartition(".")[0]
    for name, shape in shapes.items():
        place, _, own = name.rpartition(".")
        if prefix and place == parent and own.startswith("query") and len(shape) == 3 and shape[2] == hidden_size:
            names.setdefault("query_tokens", name)
        beside = name.removeprefix(f"{parent}." if parent else "")
        if prefix and beside.startswith("embeddings.") and name == f"{parent}.{beside}".lstrip("."):
            names.setdefault(beside, name)  # Blip2ForImageTextRetrieval embeds text beside its Q-Former
    fields = fields_of_qformer(source, config, hidden_size, prefix)
    if "query_tokens" in names:
        fields["num_query_tokens"] = shapes[names["query_tokens"]][1]
    is_stage_1 = config.get("model_type") == QFormerPretrainingConfig.model_type or is_retrieval_model(config)
    return StoredQFormer(fields | {"use_qformer_text_input": WORDS in names and not is_stage_1}, names)


def names_in_bert(names: Iterable[str]) -> dict[str, str]:
    """Map the names in a Q-Former to those in a BERT, without token type embeddings and heads."""
    ours = {own: name for name in names for own in our_bert_names(name)}
    prefixes = ("encoder.", "embeddings.", "layernorm.")
    return {
        own: name
        for own, name in ours.items()
        if own.startswith(prefixes) and not own.startswith(("embeddings.token_type", "embeddings.position_ids"))
    }


def our_bert_names(name: str) -> list[str]:
    """Return the names in a Q-Former of a tensor of BERT.

    A feed-forward tensor of BERT has two names, because queries and text have separate feed-forward layers in a
    Q-Former.
    """
    name = re.sub(r"^bert\.", "", name).replace(".gamma", ".weight").replace(".beta", ".bias")
    name = name.replace("embeddings.LayerNorm.", "layernorm.").replace(".attention.self.", ".attention.attention.")
    if re.search(r"layer\.\d+\.(intermediate|output)\.", name):
        return [name, re.sub(r"(layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name)]
    return [name]


def prefix_of_qformer(
    source: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], module_name: str | None
) -> str:
    """Return what the names of a Q-Former's tensors begin with: an empty text, or a module with a dot.

    Raises:
        ValueError: if there is no Q-Former, or there are several and none is named.
    """
    prefixes = [match[1] for name in shapes if (match := FIRST_LAYER.match(name))]
    if not prefixes:
        raise ValueError(
            f"{source!r} is a {config.get('model_type')!r} and has no Q-Former: give a BLIP-2, an InstructBLIP, "
            "another checkpoint with a `Blip2QFormerModel`, or a captioner of this package."
        )
    modules = [prefix.removesuffix(".") for prefix in prefixes]
    if module_name is None and len(modules) == 1:
        return prefixes[0]
    if module_name in modules:
        return prefixes[modules.index(module_name)]
    shown = ", ".join(map(repr, modules[:SHOWN_NAMES])) + (" ..." if len(modules) > SHOWN_NAMES else "")
    has = f"has {len(modules)} Q-Formers" if module_name is None else f"has no Q-Former {module_name!r}"
    raise ValueError(
        f"{source!r} {has}: choose one with `module_name` (--qformer_module_name on the command line), out of {shown}."
    )


def fields_of_qformer(source: str, config: Mapping[str, Any], hidden_size: int, prefix: str) -> dict[str, Any]:
    """Return the fields of the [`QFormerConfig`] of a Q-Former inside a checkpoint.

    Raises:
        ValueError: if the configuration has none for a Q-Former.
    """
    for part, whole in parts_of(config):
        is_qformer = str(part.get("model_type")).endswith(QFormerConfig.model_type)  # also "blip_2_qformer"
        if is_qformer and part.get("hidden_size", QFormerConfig.hidden_size) == hidden_size:
            fields = {name: part[name] for name in QFormerConfig.field_names() if name in part}
            if isinstance(whole.get("window_size"), int):  # of Granite Speech, beside the configuration of its parts
                fields.setdefault("window_size", whole["window_size"])
            return fields
    raise ValueError(
        f"{source!r} has the weights of a Q-Former ({prefix.removesuffix('.')!r}), but its config.json has no "
        'configuration of one: add "qformer_config" with its sizes and the `model_type` "blip_2_qformer".'
    )


def parts_of(
    config: Mapping[str, Any], whole: Mapping[str, Any] | None = None
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Yield a configuration and those of its parts, each with the one that holds it."""
    yield config, {} if whole is None else whole
    for value in config.values():
        if isinstance(value, Mapping):
            yield from parts_of(value, config)


def read_config_dict(source: str | os.PathLike, **hub_kwargs: Any) -> dict[str, Any]:
    """Return the configuration of a checkpoint. If transformers knows the model, it has the defaults of all fields.

    No code of the checkpoint runs. The result is empty if there is no configuration.

    Raises:
        OSError: if the configuration cannot be fetched.
    """
    stored, _ = PreTrainedConfig.get_config_dict(source, **hub_kwargs)
    return AutoConfig.for_model(**stored).to_dict() if stored.get("model_type") in CONFIG_MAPPING else stored


def is_retrieval_model(config: Mapping[str, Any]) -> bool:
    """Return True for the configuration of a `Blip2ForImageTextRetrieval`, which is a model of stage 1."""
    return config.get("model_type") == "blip-2" and "Blip2ForImageTextRetrieval" in (config.get("architectures") or [])


def names_to_read(found: StoredQFormer, config: QFormerConfig) -> dict[str, str]:
    """Return the names of the tensors of a Q-Former, without those of a text part that its configuration leaves out."""
    if config.use_qformer_text_input:
        return found.names
    names = {ours: theirs for ours, theirs in found.names.items() if not TEXT_PART.search(ours)}
    if len(names) < len(found.names):
        logger.info("The Q-Former is loaded without its text part. To keep that, set `use_qformer_text_input=True`.")
    return names


def read_renamed(source: str | os.PathLike, names: Mapping[str, str], **files: Any) -> dict[str, torch.Tensor]:
    """Return tensors of a checkpoint under other names. A tensor with two names is copied.

    Args:
        source: folder or Hub id of the checkpoint.
        names: name in the checkpoint of each tensor.
        files: options of the download, and `variant`.

    Raises:
        OSError: if a file is missing or damaged.
    """
    tensors = read_weights(source, names=set(names.values()), **files)
    copies = len(tensors) < len(names)
    return {ours: tensors[theirs].clone() if copies else tensors[theirs] for ours, theirs in names.items()}


def arguments_for(
    source: str | os.PathLike, module_name: str | None = None, config: QFormerConfig | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments with which `QFormerModel.from_pretrained` loads a checkpoint.

    Args:
        source: folder or Hub id of the checkpoint.
        module_name: name of the Q-Former's module, if the checkpoint has several Q-Formers.
        config: configuration of the Q-Former. By default it is that of the checkpoint.
        kwargs: other arguments of `from_pretrained`, and fields of the configuration.

    Returns:
        The arguments unchanged for a captioner or Q-Former of this package. For another checkpoint, the weights of its
        Q-Former as `state_dict`, with its configuration.

    Raises:
        OSError: if the checkpoint cannot be read, or has no Q-Former or several.
    """
    own = {"pretrained_model_name_or_path": source, "config": config, **kwargs}
    hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
    try:
        stored = read_config_dict(source, **hub_kwargs)
    except OSError:
        if config is None:
            raise
        return own  # there are only weights
    if stored.get("model_type") in (None, QFormerConfig.model_type, QFormerCaptionerConfig.model_type):
        return own
    files = {**hub_kwargs, "variant": kwargs.pop("variant", None)}
    given = stored if config is None else config.to_dict()
    try:
        found = find_qformer(os.fspath(source), given, read_shapes(source, **files), module_name)
    except ValueError as error:
        raise OSError(str(error)) from error
    fields = {name: kwargs.pop(name) for name in QFormerConfig.field_names() & kwargs.keys()}
    if config is None:
        config = QFormerConfig.from_fields(**{**found.fields, **fields})
        config.dtype = (stored.get("dtypes") or {}).get("qformer", stored.get("dtype", stored.get("torch_dtype")))
    check_number_of_layers(config)
    weights = read_renamed(source, names_to_read(found, config), **files)
    others = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights, **others}


# ----------------------------------------------------------------------------------------------------------------------
# Whole models of BLIP-2
# ----------------------------------------------------------------------------------------------------------------------


def our_name(name: str) -> str | None:
    """Return the name in a model of this package of a tensor of BLIP-2 or InstructBLIP.

    Returns `None` for buffers that only some versions of transformers saved. The model computes them.

    Example:

    ```python
    >>> our_name("query_tokens")
    'qformer.query_tokens'
    ```
    """
    if name.endswith((".position_ids", "rotary_emb.inv_freq")):
        return None
    if name == "query_tokens":
        return "qformer.query_tokens"
    name = re.sub(r"^embeddings\.", "qformer.embeddings.", name)  # Blip2ForImageTextRetrieval
    return name.replace("qformer.embeddings.layernorm.", "qformer.layernorm.")  # InstructBLIP


def retrieval_arguments(
    source: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase | None,
    load_vision_model: bool = True,
    **kwargs: Any,
) -> dict[str, Any]:
    """Return the arguments with which a [`QFormerForPretraining`] is made from a `Blip2ForImageTextRetrieval`.

    Its vision encoder is frozen and kept by reference to the checkpoint. Its output layer for texts is new, so
    `itg_weight` is 0 by default.

    Args:
        source: folder or Hub id of the checkpoint.
        tokenizer: its tokenizer, if it has one. Missing embeddings of tokens are newly initialised.
        load_vision_model: `False` leaves the vision encoder out of memory.
        kwargs: other arguments of `from_pretrained`, and fields of the [`QFormerPretrainingConfig`].

    Raises:
        OSError: if the checkpoint cannot be read.
    """
    hub_kwargs = {name: kwargs.pop(name) for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
    files = {**hub_kwargs, "variant": kwargs.pop("variant", None)}
    stored = read_config_dict(source, **hub_kwargs)
    names = {ours: name for name in read_shapes(source, **files) if (ours := our_name(name)) is not None}
    if not load_vision_model:
        names = {ours: name for ours, name in names.items() if not ours.startswith("vision_model.")}
    weights = read_renamed(source, names, **files)
    fields = {name: value for name, value in stored["qformer_config"].items() if name in QFormerConfig.field_names()}
    fields["num_query_tokens"] = stored["num_query_tokens"]
    words = weights.get("qformer.embeddings.word_embeddings.weight")
    if tokenizer is not None and words is not None and tokenizer.bos_token_id >= len(words):
        new = words.new_empty(tokenizer.bos_token_id + 1 - len(words), words.shape[1])
        weights["qformer.embeddings.word_embeddings.weight"] = torch.cat([words, new.normal_(std=0.02)])
        fields["vocab_size"] = tokenizer.bos_token_id + 1
    dtypes = {name.partition(".")[0]: str(tensor.dtype).removeprefix("torch.") for name, tensor in weights.items()}
    dtypes["lm_head"] = dtypes["qformer"]
    dtypes.setdefault("vision_model", dtypes["qformer"])
    tokens = {"bos_token_id": "bos_token_id", "eos_token_id": "sep_token_id", "pad_token_id": "pad_token_id"}
    given = {name: kwargs.pop(name) for name in QFormerPretrainingConfig.field_names() & kwargs.keys()}
    config = QFormerPretrainingConfig(
        vision_config=stored["vision_config"],
        qformer_config=fields,
        **{
            "image_text_hidden_size": stored["image_text_hidden_size"],
            "vision_model_name_or_path": os.path.abspath(source) if os.path.isdir(source) else os.fspath(source),
            "vision_model_revision": commit_of(source, hub_kwargs.get("revision")),
            "freeze_vision_model": True,
            "itg_weight": 0.0,  # a new output layer for texts has learned nothing
            "referenced_backbones": ["vision_model"],
            "dtypes": dtypes,
            "dtype": dtypes["vision_model"],
            **{name: getattr(tokenizer, theirs, None) for name, theirs in tokens.items()},
            **given,
        },
    )
    check_number_of_layers(config)
    if not load_vision_model:
        kwargs["vision_model"] = placeholder_for(cast(PreTrainedConfig, config.vision_config), dtypes["vision_model"])
    logger.warning(
        f"The output layer for texts (`lm_head`) and the temperature (`logit_scale`) are newly initialised: {source!s} "
        "lacks them. transformers' conversion of LAVIS' models left them out. `itg_weight` is "
        f"{config.itg_weight:g}: with 0, the output layer is not trained, and captions have no meaning."
    )
    return {"config": config, "state_dict": weights, "load_vision_model": load_vision_model, **kwargs}
