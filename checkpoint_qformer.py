"""The Q-Former inside a checkpoint of another model, found by the names of its tensors.

BLIP-2, InstructBLIP and Granite Speech have a `Blip2QFormerModel`, or a module with the same parameters, at different
places. Its query tokens are a parameter beside it.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .backbones_qformer import check_number_of_layers
from .configuration_qformer import QFormerCaptionerConfig, QFormerConfig, QFormerPretrainingConfig
from .processing_qformer import HUB_KWARGS
from .weights_qformer import read_shapes, read_weights

# Each Q-Former has cross-attention in its first layer, under this name.
FIRST_LAYER = re.compile(r"^(.*?)encoder\.layer\.0\.crossattention\.attention\.key\.weight$")
PARAMETERS = ("encoder.", "layernorm.", "embeddings.", "query_tokens", "frame_embeddings")  # of a `QFormerModel`
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
    reads_text = "embeddings.word_embeddings.weight" in names
    if config.get("model_type") == QFormerPretrainingConfig.model_type:
        reads_text = False  # the text part is for comparing; in a captioner, the language model reads the prompt
    return StoredQFormer(fields | {"use_qformer_text_input": reads_text}, names)


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
        config.dtype = stored.get("dtype", stored.get("torch_dtype"))
    check_number_of_layers(config)
    tensors = read_weights(source, names=set(found.names.values()), **files)
    weights = {ours: tensors[theirs] for ours, theirs in found.names.items()}
    others = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
    return {"pretrained_model_name_or_path": None, "config": config, "state_dict": weights, **others}
