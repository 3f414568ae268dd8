"""Loading and saving of models, whose folders hold the weights of the backbones or keep them by reference.

captioner_qformer.py subclasses the class of this file for captioners, and pretraining_qformer.py for pretraining.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig, PreTrainedConfig
from transformers.integrations.peft import maybe_load_adapters
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, logging
from transformers.utils.hub import DownloadKwargs, cached_file

from .backbones_qformer import (
    VisionModelPlaceholder,
    check_number_of_layers,
    dtype_of,
    is_quantized,
    load_backbone,
)
from .cards_qformer import PushWithCard
from .configuration_qformer import VisionQFormerConfig, special_tokens_of, without_local_paths
from .parts_qformer import QFormerParts
from .processing_qformer import HUB_KWARGS, QFormerProcessor
from .weights_qformer import (
    BackboneFingerprint,
    count_weights,
    delete_replaced_weights,
    forget_broken_ties,
    plain_name,
    put_adapter_aside,
    read_dora_magnitudes,
    read_weights,
    replacing_weights,
    ties_of,
)

logger = logging.get_logger(__name__)


class QFormerPreTrainedModel(PushWithCard, QFormerParts):
    """Base class that loads and saves a model, and records which of its backbones are kept by reference.

    A folder may leave out a frozen backbone that can be fetched by its name and commit, which are in the configuration.
    `config.referenced_backbones` lists these backbones. A backbone whose weights have changed, for example because an
    adapter was merged into it, is always saved.

    Subclasses name their backbones and the class of their processor. They set each backbone as an attribute, and their
    constructor accepts `vision_model` as a keyword.
    """

    config_class: type[VisionQFormerConfig]  # type: ignore[assignment]
    processor_class: ClassVar[type[QFormerProcessor]]
    processor: QFormerProcessor | None
    _fingerprints: dict[str, BackboneFingerprint]  # of the backbones as they were fetched
    _reported_backbones: set[str]  # a warning said that their weights have changed

    def __init__(self, config: VisionQFormerConfig, *inputs: Any, **kwargs: Any):
        super().__init__(config, *inputs, **kwargs)
        self.processor = None
        self._fingerprints = {}
        self._reported_backbones = set()
        self._was_loaded = False  # a model that was loaded keeps the name of its source
        if not config.has_vision_model:
            self.feature_width = cast(PreTrainedConfig, config.vision_config).hidden_size

    # --- Backbones ----------------------------------------------------------------------------------------------------

    def local_backbones(self) -> list[str]:
        """Return the names of the backbones that were loaded from a local folder and that others cannot fetch.

        A quantised language model is left out: its original weights are not in memory, so it cannot be saved.
        """
        local = [part for part in self.backbones if os.path.isdir(getattr(self.config, f"{part}_name_or_path") or "")]
        return [part for part in local if not is_quantized(getattr(self, part))]

    def load_vision_model(self) -> None:
        """Fetch the vision encoder of a model that was loaded without it; otherwise do nothing.

        A model that was trained on features of an unknown encoder has no vision encoder to fetch.

        Raises:
            OSError: if the vision encoder cannot be fetched; the message names it.
        """
        if isinstance(self.vision_model, VisionModelPlaceholder) and self.config.has_vision_model:
            name, revision = self.config.vision_model_name_or_path, self.config.vision_model_revision
            vision_model = load_backbone("vision_model", str(name), revision, dtype_of(self.vision_model))
            vision_model.to(self.device)  # type: ignore[arg-type]
            self.vision_model = vision_model.requires_grad_(False).eval()
            self._take_fingerprints(["vision_model"])
            self._keep_by_reference(self.config.referenced_backbones or [])

    def keys_left_out(
        self, include_backbones: bool | Sequence[str] = False, weights: Mapping[str, torch.Tensor] | None = None
    ) -> set[str]:
        """Return the names of the weights that `save_pretrained(include_backbones=...)` does not write.

        Args:
            include_backbones (`bool` or list of backbones): see [`~QFormerPreTrainedModel.save_pretrained`].
            weights (`dict[str, torch.Tensor]`, *optional*): the weights to save, by default `self.state_dict()`.

        Raises:
            ValueError: for an unknown backbone, or a quantised language model that would have to be saved.
        """
        weights = self.state_dict() if weights is None else weights
        referenced = self._backbones_to_reference(self._backbones_to_include(include_backbones), weights)
        return self._keys_of(referenced, weights)

    def _take_fingerprints(self, parts: Iterable[str]) -> None:
        for part in parts:
            self._fingerprints[part] = BackboneFingerprint.of(getattr(self, part))

    def _keep_by_reference(self, parts: Sequence[str]) -> None:
        """Leave the weights of these backbones out of saved folders by default."""
        self.config.referenced_backbones = list(parts)
        # The Trainer compares the keys that a checkpoint lacks with this attribute.
        self._keys_to_ignore_on_save = self._keys_of(parts, self.state_dict())

    def _keys_of(self, parts: Sequence[str], weights: Iterable[str]) -> set[str]:
        return {name for name in weights if name.partition(".")[0] in parts} | set(ties_of(self))

    # --- Loading ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        dtype=None,
        load_vision_model=True,
        before_adapter: Callable[[Any], None] | None = None,
        **kwargs,
    ):
        """Load a model from a folder or the Hub, and fetch the backbones that it keeps by reference.

        Args:
            pretrained_model_name_or_path (`str`): folder or Hub id.
            config ([`VisionQFormerConfig`] or `str`, *optional*): configuration, or folder that holds one. By default
                it is that of the model, and keywords that are its fields (`pad_token_id=0`) override it.
            dtype (`str` or `torch.dtype`, *optional*): dtype of every part. Without it, each part has the dtype that it
                was saved in.
            load_vision_model (`bool`, defaults to `True`): `False` leaves the vision encoder out of memory, to train on
                precomputed features. [`~QFormerPreTrainedModel.load_vision_model`] fetches it later.
            before_adapter (*optional*): function that changes the loaded model before an adapter is loaded on it.
            model_args, kwargs: passed to `PreTrainedModel.from_pretrained` (`device_map`, `revision`, `token`, ...).

        Returns:
            The model in evaluation mode. Backbones that were frozen when it was saved are frozen again.

        Raises:
            OSError: if the model or one of its backbones cannot be fetched; the message names it. Also for another kind
                of model, and for an adapter that does not name its model.
            TypeError: for a `quantization_config`, because only the language model of a captioner can be quantised.
            ValueError: if `load_vision_model=False` and the vision encoder could not be fetched later.

        Example:

        ```python
        >>> model = QFormerForPretraining.from_pretrained("outputs/stage1")  # doctest: +SKIP
        >>> model.similarity("photo.jpg", ["a dog", "a red car"])  # doctest: +SKIP
        tensor([[0.41, 0.12]])
        ```
        """
        if kwargs.get("quantization_config") is not None:
            raise TypeError(f"A {cls.config_class.kind} has no language model: leave out `quantization_config`.")
        source = pretrained_model_name_or_path
        former_dtype = kwargs.pop("torch_dtype", None)  # its former name, which transformers still accepts
        dtype = former_dtype if dtype is None else dtype
        hub_kwargs = {name: kwargs[name] for name in (*HUB_KWARGS, "subfolder") if name in kwargs}
        files = {**hub_kwargs, "variant": kwargs.get("variant")}
        # `AutoModel` passes the path of an adapter here. transformers loses it where the weights are a `state_dict`.
        adapter, source, adapter_kwargs = maybe_load_adapters(
            source, cast(DownloadKwargs, hub_kwargs), **(kwargs.pop("adapter_kwargs", None) or {})
        )
        if adapter is not None and source is None:
            raise OSError(
                f"The adapter {str(adapter)!r} names no {cls.config_class.kind}. Write the folder of its model as "
                "`base_model_name_or_path` into its `adapter_config.json`."
            )

        if not isinstance(config, PreTrainedConfig):  # fields of the configuration may also be keywords
            cls.config_class.check_source(config or source, hub_kwargs)
            others = {name: value for name, value in kwargs.items() if name not in hub_kwargs}
            config, others = cls.config_class.from_pretrained(
                str(config or source), return_unused_kwargs=True, **hub_kwargs, **others
            )
            kwargs = others | hub_kwargs
        config = cls._resolve_config(source, config, dtype, load_vision_model)
        kwargs |= {"config": config, "dtype": dtype, "use_safetensors": True}
        if kwargs.get("state_dict") is None:
            kwargs |= cls._collect_weights(source, config, dtype, load_vision_model, files, adapter is not None)
        # With a `state_dict` no file of the folder is read.
        loaded = super().from_pretrained(source if kwargs.get("state_dict") is None else None, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # a tuple with `output_loading_info=True`

        forget_broken_ties(model)
        model._freeze()
        model._keep_by_reference(config.referenced_backbones or [])
        # A trainable backbone may differ from the pretrained model of its name, so it has no fingerprint.
        model._take_fingerprints(part for part in cls.backbones if getattr(config, f"freeze_{part}"))
        if before_adapter is not None:
            before_adapter(model)
        if source is not None:
            model._load_companions(source, kwargs.get("generation_config"), hub_kwargs)
        if adapter is not None:
            model._load_adapter(adapter, {**hub_kwargs, **adapter_kwargs})
        return loaded

    @classmethod
    def _resolve_config(
        cls,
        source: str | os.PathLike | None,
        config: VisionQFormerConfig,
        dtype: str | torch.dtype | None,
        load_vision_model: bool,
    ) -> VisionQFormerConfig:
        """Return a checked copy of the configuration, in which a given `dtype` replaces the saved ones."""
        config = copy.deepcopy(config)
        check_number_of_layers(config)
        for part in config.referenced_backbones or []:
            if part not in cls.backbones or getattr(config, f"{part}_name_or_path") is None:
                raise OSError(
                    f"The {config.kind} {str(source)!r} keeps {part!r} by reference but does not name it. Save it "
                    "again with `include_backbones=True`."
                )
        can_be_left_out = config.freeze_vision_model and config.vision_model_name_or_path
        if not load_vision_model and config.has_vision_model and not can_be_left_out:
            raise ValueError(
                f"The {config.kind} {str(source)!r} has its own vision encoder and cannot be loaded without it: "
                "leave out `load_vision_model=False`."
            )
        # A user may also have changed `config.dtype`, in which transformers saves the dtype of the first part.
        stored = (config.dtypes or {}).get("vision_model")
        if dtype not in (None, "auto") or (stored and str(config.dtype).removeprefix("torch.") not in ("None", stored)):
            config.dtypes = None
        return config

    @classmethod
    def _collect_weights(
        cls,
        source: str | os.PathLike,
        config: VisionQFormerConfig,
        dtype: str | torch.dtype | None,
        load_vision_model: bool,
        files: dict[str, Any],
        has_adapter: bool,
    ) -> dict[str, Any]:
        """Fetch the backbones that are not in the folder, and add their weights to those of the folder.

        Returns:
            The arguments `state_dict` and, without the vision encoder, `vision_model` of `from_pretrained`. For a
            folder that holds all weights, no arguments: transformers then reads the files itself. It would also read an
            adapter in the same folder, which [`from_pretrained`] loads later.
        """
        parts = set(config.referenced_backbones or [])
        if not load_vision_model and config.has_vision_model:
            parts.add("vision_model")
        if not parts and not has_adapter:
            cls._check_size(source, config, count_weights(source, **files))
            return {}
        weights = read_weights(source, **files)
        arguments: dict[str, Any] = {}
        download = {name: files[name] for name in HUB_KWARGS if name in files and name != "revision"}
        for part in parts:
            backbone = load_backbone(
                part,
                getattr(config, f"{part}_name_or_path"),
                getattr(config, f"{part}_revision"),
                getattr(torch, config.dtypes[part]) if config.dtypes else dtype,
                load_weights=load_vision_model or part != "vision_model",
                **download,
            )
            if isinstance(backbone, VisionModelPlaceholder):
                arguments["vision_model"] = backbone
                weights = {name: weights[name] for name in weights if not name.startswith("vision_model.")}
            weights.update({f"{part}.{name}": tensor for name, tensor in backbone.state_dict().items()})
        cls._check_size(source, config, sum(tensor.numel() for tensor in weights.values()), **arguments)
        return {**arguments, "state_dict": weights}

    @classmethod
    def _check_size(
        cls,
        source: str | os.PathLike,
        config: VisionQFormerConfig,
        available: int,
        vision_model: VisionModelPlaceholder | None = None,
    ) -> None:
        """Refuse a configuration that needs many more weights than are available. The rest would be random.

        Raises:
            OSError: if it needs more than twice the number of available weights.
        """
        with torch.device("meta"):
            model = cls(copy.deepcopy(config), vision_model=vision_model)
        needed = sum(parameter.numel() for parameter in model.parameters())
        if needed > 2 * available:
            raise OSError(
                f"The configuration of the {config.kind} {str(source)!r} needs {needed:,} weights, but its files hold "
                f"{available:,}. Fetch it again."
            )

    def _load_companions(
        self, source: str | os.PathLike, generation_config: GenerationConfig | None, hub_kwargs: dict[str, Any]
    ) -> None:
        """Load the generation configuration and the processor that are saved next to the weights."""
        file = cached_file(source, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if file is not None and self.can_generate():  # other libraries may not write it
            saved = GenerationConfig.from_pretrained(source, **hub_kwargs)  # transformers ignores a damaged file
            stored = self.config_class.from_pretrained(str(source), **hub_kwargs)
            for name, value in special_tokens_of(saved).items():
                if getattr(self.config, name, None) == getattr(stored, name, None):  # and not given by the caller
                    setattr(self.config, name, value)
            if generation_config is None:
                self.generation_config = saved
        self.processor = self.processor_class.from_folder_if_any(source, **hub_kwargs)
        # peft writes `name_or_path` into adapter folders, and transformers writes `config.name_or_path` into
        # configurations.
        self._was_loaded = True
        folder = Path(source, hub_kwargs.get("subfolder") or "")
        self.name_or_path = self.config.name_or_path = str(folder if folder.is_dir() else source)

    def _load_adapter(self, adapter: str, hub_kwargs: dict[str, Any]) -> None:
        """Load an adapter and, if its folder holds one, its processor, which may have another prompt."""
        self.load_adapter(adapter, adapter_kwargs=hub_kwargs)
        if any("lora_magnitude_vector" in name for name, _ in self.named_parameters()):
            super().load_state_dict(read_dora_magnitudes(adapter, **hub_kwargs), strict=False)
        processor = self.processor_class.from_folder_if_any(adapter, **hub_kwargs)
        if processor is not None:
            self.processor = processor

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the weights, and warn if peft saves adapters that would not find their model again.

        Their names are the same if a layer is wrapped by `torch.compile`.
        """
        weights = super().state_dict(*args, **kwargs)
        for name in [name for name in weights if name != plain_name(name)]:
            weights[plain_name(name)] = weights.pop(name)
        if not self.name_or_path and any(".base_layer." in name for name in weights):
            logger.warning_once(
                f"The adapters are on a {self.config.kind} that was never saved, so a saved adapter cannot name it: "
                "call its `save_pretrained` before `get_peft_model`."
            )
        return weights

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load weights under the names that `state_dict()` gives them."""
        names = {plain_name(name): name for name, _ in self.named_parameters(remove_duplicate=False)}
        names |= {plain_name(name): name for name, _ in self.named_buffers(remove_duplicate=False)}
        weights = {names.get(name, name): weight for name, weight in state_dict.items()}
        return super().load_state_dict(weights, *args, **kwargs)

    # --- Saving -------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        *args: Any,
        include_backbones: bool | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens anywhere.

        The configuration of the model does not change. A vision encoder that was left out of memory is fetched if its
        weights are saved, and then stays in memory. The saved configuration says which backbones the folder keeps by
        reference, which are frozen, and which dtypes the parts have.

        Args:
            save_directory (`str`): folder to write.
            is_main_process (`bool`, defaults to `True`): whether this process writes the files.
            state_dict (`dict[str, torch.Tensor]`, *optional*): weights to save, by default those of the model.
            push_to_hub (`bool`, defaults to `False`): upload the folder too. By default it then has the weights of
                backbones that were loaded from a local folder.
            max_shard_size (`int` or `str`, defaults to `"50GB"`): largest size of a file of weights.
            variant (`str`, *optional*): part of the names of the weights, as in `model.fp16.safetensors`. Weights that
                were saved before as the same variant are replaced, sharded or not. Other variants stay.
            include_backbones (`bool` or list of `str`, *optional*): `True` saves the weights of all backbones, a list
                such as `["vision_model"]` those of the named ones. The other frozen backbones are kept by reference if
                their names can be fetched. By default the choice of loading is kept: a model from `from_backbones`
                keeps all frozen backbones by reference. Trained backbones are always saved.
            args, kwargs: passed to `PreTrainedModel.save_pretrained` (`repo_id`, `token`, ...).

        Raises:
            OSError: if the vision encoder has to be fetched but cannot be; the message names it.
            ValueError: for an unknown backbone, or for adapters of PEFT that were not merged. Also for a quantised
                language model that would have to be saved.

        Example:

        ```python
        >>> model.save_pretrained("captioner", include_backbones=True)  # doctest: +SKIP
        ```
        """
        if include_backbones is None:
            referenced = self._public_references() if push_to_hub else self.config.referenced_backbones or []
            include_backbones = [part for part in self.backbones if part not in referenced]
        included = self._backbones_to_include(include_backbones)
        if "vision_model" in included:
            self.load_vision_model()
        weights = self.state_dict() if state_dict is None else state_dict  # gathered by FSDP and DeepSpeed
        if any(".base_layer." in name for name in weights) and not self._hf_peft_config_loaded:
            raise ValueError(
                f"There are adapters on the {self.config.kind} that loading would not find: save the `PeftModel`, or "
                "call its `merge_and_unload()` first."
            )
        referenced = self._backbones_to_reference(included, weights)
        config = self._config_to_save(included, referenced)
        if self.processor is not None and is_main_process:
            self.processor.save_pretrained(save_directory)
        replacing = replacing_weights(save_directory, variant) if is_main_process else nullcontext()
        with self._temporary(config, self._keys_of(referenced, weights)), replacing:
            super().save_pretrained(
                save_directory, is_main_process, state_dict, push_to_hub, max_shard_size, variant, *args, **kwargs
            )
        if is_main_process and not self._hf_peft_config_loaded:
            put_adapter_aside(save_directory)
        if not self._was_loaded and not push_to_hub:
            self.name_or_path = os.path.abspath(save_directory)  # by which an adapter finds its model

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:  # type: ignore[override]
        """Upload the model, including the weights of backbones that were loaded from a local folder.

        Args:
            repo_id (`str`): repository on the Hub.
            kwargs: passed to `PreTrainedModel.push_to_hub` (`private`, `token`, `commit_message`, ...).

        Raises:
            OSError: if the vision encoder has to be fetched but cannot be; the message names it.
        """
        referenced = self._public_references()
        if "vision_model" not in referenced:
            self.load_vision_model()  # changes the keys to save, which `_temporary` would restore
        config = copy.deepcopy(self.config)
        config.referenced_backbones = referenced
        with self._temporary(config, self._keys_to_ignore_on_save):
            commit = super().push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        if not self._was_loaded:
            self.name_or_path = repo_id
        return commit

    def _public_references(self) -> list[str]:
        """Return the referenced backbones that others can fetch."""
        local = self.local_backbones()
        return [part for part in self.config.referenced_backbones or [] if part not in local]

    def _upload_modified_files(  # type: ignore[override]  # transformers passes the rest as keywords
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """Upload a folder without local paths in its configuration, and delete the weights that the upload replaces."""
        file = Path(working_dir, CONFIG_NAME)
        config = without_local_paths(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        timestamps = self._get_files_timestamps(working_dir)
        written = [name for name, time in timestamps.items() if time > files_timestamps.get(name, 0)]
        commit = super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
        delete_replaced_weights(repo_id, written, commit.pr_revision or kwargs.get("revision"), kwargs.get("token"))
        return commit

    def _backbones_to_include(self, include_backbones: bool | Sequence[str]) -> list[str]:
        if isinstance(include_backbones, bool):
            return list(self.backbones) if include_backbones else []
        if unknown := set(include_backbones) - set(self.backbones):
            raise ValueError(f"`include_backbones` names {sorted(unknown)}; the backbones are {list(self.backbones)}.")
        return list(include_backbones)

    def _backbones_to_reference(self, included: Sequence[str], weights: Mapping[str, torch.Tensor]) -> list[str]:
        """Return the frozen backbones that a folder can keep by reference, because their weights have not changed."""
        referenced = []
        for part in self.frozen_backbones():
            named = getattr(self.config, f"{part}_name_or_path") is not None
            if part not in included and named and self._matches_name(part, weights):
                referenced.append(part)
        return referenced

    def _matches_name(self, part: str, weights: Mapping[str, torch.Tensor]) -> bool:
        """Return True if a backbone still has the weights of its name, as far as the fingerprint shows."""
        prefix = f"{part}."
        own = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        return part in self._fingerprints and self._fingerprints[part].matches(own)

    def _config_to_save(self, included: Sequence[str], referenced: Sequence[str]) -> VisionQFormerConfig:
        """Return a copy of the configuration that describes the folder to write."""
        config, frozen = copy.deepcopy(self.config), self.frozen_backbones()
        config.referenced_backbones = list(referenced)
        config.dtypes = {name: str(dtype_of(part)).removeprefix("torch.") for name, part in self.named_children()}
        for part in self.backbones:
            setattr(config, f"freeze_{part}", part in frozen)
            name = getattr(config, f"{part}_name_or_path")
            if part in frozen and part not in (*included, *referenced) and name is not None:
                if part not in self._reported_backbones:
                    logger.warning(f"The {part} no longer has the weights of {name!r}, so its weights are saved.")
                    self._reported_backbones.add(part)
                for field in ("name_or_path", "revision"):  # otherwise a later save would keep it by reference
                    setattr(config, f"{part}_{field}", None)
        return config

    @contextmanager
    def _temporary(self, config: VisionQFormerConfig, keys_to_ignore: Iterable[str] | None) -> Iterator[None]:
        """Replace the configuration and the keys to save inside a `with` block, and restore them after it.

        `fully_shard` (FSDP2) gives a module a class of its own, whose code transformers would save instead of ours.
        Inside the block the module has its original class.
        """
        kept = self.__class__, self.config, self._keys_to_ignore_on_save
        if isinstance(self, FSDPModule):
            _, self.__class__ = type(self).__bases__
        self.config, self._keys_to_ignore_on_save = config, set(keys_to_ignore or ())
        try:
            yield
        finally:
            self.__class__, self.config, self._keys_to_ignore_on_save = kept
