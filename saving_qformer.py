"""A captioner in a folder or on the Hub: its frozen backbones are held there, or referred to by name.

What a captioner computes is in modeling_qformer.py, whose class builds on the one here.
"""

import copy
import json
import os
from collections.abc import Sequence

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from .backbones_qformer import (
    BACKBONES,
    VisionModelPlaceholder,
    check_layers,
    dtype_of,
    is_frozen,
    is_quantized,
    load_backbone,
    number_of_weights,
    one_device,
    read_weights,
)
from .configuration_qformer import QFormerCaptionerConfig, without_local_paths
from .processing_qformer import PushWithCard, QFormerCaptionerProcessor

logger = logging.get_logger(__name__)


def numbers_of(weight: torch.Tensor) -> torch.Tensor:
    """Its first column and its first row: training, merging an adapter, or other rows for some words change some."""
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach().flatten()[None]
    return torch.cat([rows[:, :1].flatten(), rows[:1].flatten()]).cpu()


class QFormerCaptionerPreTrainedModel(PushWithCard, PreTrainedModel):
    """A `PreTrainedModel` that need not save the frozen models it is made of: whoever loads it fetches them by name.

    Which ones is `config.referenced_backbones`; names and commits are in the configuration, too. A name stands for the
    weights that were fetched by it: a backbone that has others by now (an adapter was merged into it, say) is saved.
    """

    def _frozen_backbones(self) -> list[str]:
        return [part for part in BACKBONES if is_frozen(getattr(self, part))]

    def local_backbones(self) -> list[str]:
        """The backbones that came from a folder of this machine, so that nobody else can fetch them by name.

        A quantised language model is none of them: its weights are not here, so there is no choice but to refer to it.
        """
        parts = [part for part in BACKBONES if os.path.isdir(getattr(self.config, f"{part}_name_or_path") or "")]
        return [part for part in parts if not is_quantized(getattr(self, part))]

    def _note_weights(self, parts: Sequence[str]) -> None:
        """Take down some numbers of the weights of backbones that came by name, to tell later if they are the same."""
        for part in parts:
            weights = {f"{part}.{name}": weight for name, weight in getattr(self, part).state_dict().items()}
            self._noted[part] = {
                name: (weight.shape, numbers_of(weight)) for name, weight in weights.items() if not weight.is_meta
            }

    def _is_as_fetched(self, part: str, weights: dict[str, torch.Tensor]) -> bool:
        """Whether a backbone has the weights that its name stands for. Of one in 4 or 8 bits there is no telling."""
        if is_quantized(getattr(self, part)):
            return True
        return part in self._noted and all(
            weights[name].shape == shape and torch.equal(numbers_of(weights[name]), numbers.to(weights[name].dtype))
            for name, (shape, numbers) in self._noted[part].items()
            if name in weights and not weights[name].is_meta
        )

    def _freeze(self) -> None:
        if self.config.freeze_vision_model:
            self.vision_model.requires_grad_(False)
        if self.config.freeze_language_model:
            self.language_model.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        config=None,
        dtype=None,
        load_vision_model=True,
        quantization_config=None,
        **kwargs,
    ):
        """Load a captioner from a folder or the Hub, with the backbones that it keeps by reference.

        Takes what `PreTrainedModel.from_pretrained` takes. Without `dtype` every part comes back in the dtype that it
        was saved in. Backbones that were frozen are frozen again. `load_vision_model=False` leaves the vision encoder
        out of memory, as in `from_backbones`. With `quantization_config` the language model comes in 4 or 8 bits
        ([`~QFormerCaptioner.quantize_language_model`]), and all of it on one device.

        Raises:
            OSError: if the captioner or one of its backbones cannot be fetched; the message names it.
            ValueError: if the vision encoder is to be left out, but could not be fetched by its name later; or if what
                is to be quantised is to be spread over devices.
        """
        dtype = kwargs.pop("torch_dtype", dtype)  # its old name, which transformers still takes
        device = None
        if quantization_config is not None:
            device = one_device(kwargs.pop("device_map", None))
        hub_kwargs = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            if name in kwargs
        }
        # `AutoModel` was given an adapter: transformers would forget it where a captioner refers to its backbones.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        config = copy.deepcopy(config)
        check_layers(config)
        for part in config.referenced_backbones or []:
            if part not in BACKBONES or getattr(config, f"{part}_name_or_path") is None:
                raise OSError(f"The captioner {str(pretrained_model_name_or_path)!r} refers to no {part!r} by name.")
        if dtype not in (None, "auto"):
            config.dtypes = None
        kwargs = {**kwargs, "config": config, "dtype": dtype, "use_safetensors": True}

        if not load_vision_model and not (config.freeze_vision_model and config.vision_model_name_or_path):
            raise ValueError(
                f"The captioner {str(pretrained_model_name_or_path)!r} has a vision encoder of its own and cannot be "
                "loaded without it."
            )
        fetched = set(config.referenced_backbones or []) | ({"vision_model"} if not load_vision_model else set())
        if fetched and kwargs.get("state_dict") is None:
            weights = read_weights(pretrained_model_name_or_path, **hub_kwargs)
            download = {key: hub_kwargs[key] for key in hub_kwargs if key not in ("revision", "subfolder")}
            for part in fetched:
                absent = part == "vision_model" and not load_vision_model
                backbone = load_backbone(
                    part,
                    getattr(config, f"{part}_name_or_path"),
                    getattr(config, f"{part}_revision"),
                    getattr(torch, config.dtypes[part]) if config.dtypes else dtype,
                    absent=absent,
                    **download,
                )
                if absent:
                    kwargs["vision_model"] = backbone
                    weights = {name: weights[name] for name in weights if not name.startswith("vision_model.")}
                weights.update({f"{part}.{name}": tensor for name, tensor in backbone.state_dict().items()})
            there = sum(tensor.numel() for tensor in weights.values())
            cls._check_size(pretrained_model_name_or_path, config, there, kwargs.get("vision_model"))
            loaded = super().from_pretrained(None, *model_args, state_dict=weights, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
            # peft writes down the one, transformers the other.
            model.name_or_path = model.config.name_or_path = os.fspath(pretrained_model_name_or_path)
        else:
            if kwargs.get("state_dict") is None:
                there = number_of_weights(pretrained_model_name_or_path, **hub_kwargs)
                cls._check_size(pretrained_model_name_or_path, config, there)
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            if pretrained_model_name_or_path is not None and model.generation_config.max_new_tokens is None:
                # transformers passes over one that is damaged without a word.
                model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        model._freeze()
        model._reference(config.referenced_backbones or [])
        # One that was trained has weights of its own, whatever its name, and frozen again it has them still.
        model._note_weights([part for part in BACKBONES if getattr(config, f"freeze_{part}")])
        if quantization_config is not None:
            model.quantize_language_model(quantization_config, device)
        if pretrained_model_name_or_path is not None:
            model.processor = QFormerCaptionerProcessor.from_folder_if_any(pretrained_model_name_or_path, **hub_kwargs)
        if adapter is not None:
            adapter_kwargs = {**hub_kwargs, **adapter_kwargs}
            model.load_adapter(adapter, adapter_kwargs=adapter_kwargs)
            own = QFormerCaptionerProcessor.from_folder_if_any(adapter, **adapter_kwargs)
            model.processor = own if own is not None else model.processor  # the adapter may be of another prompt
        return loaded

    @classmethod
    def _check_size(
        cls,
        source: str | os.PathLike,
        config: QFormerCaptionerConfig,
        there: int,
        vision_model: VisionModelPlaceholder | None = None,
    ) -> None:
        """Refuse a configuration that asks for much more weights than are there: transformers would make the rest up.

        Raises:
            OSError: for such a one.
        """
        with torch.device("meta"):
            model = cls(copy.deepcopy(config), vision_model=vision_model)
        asked = sum(parameter.numel() for parameter in model.parameters())
        if asked > 2 * there:
            raise OSError(
                f"The configuration of the captioner {str(source)!r} asks for {asked:,} weights, and its files hold "
                f"{there:,}."
            )

    def load_vision_model(self) -> None:
        """Fetch the vision encoder of a captioner that was loaded without it; otherwise do nothing.

        Raises:
            OSError: if it cannot be fetched; the message names it.
        """
        if isinstance(self.vision_model, VisionModelPlaceholder):
            name, revision = self.config.vision_model_name_or_path, self.config.vision_model_revision
            vision_model = load_backbone("vision_model", name, revision, dtype_of(self.vision_model))
            self.vision_model = vision_model.requires_grad_(False).eval().to(self.device)
            self._note_weights(["vision_model"])
            self._reference(self.config.referenced_backbones or [])

    def save_pretrained(
        self, save_directory: str | os.PathLike, include_backbones: bool | Sequence[str] | None = None, **kwargs
    ) -> None:
        """Write a folder that `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens anywhere.

        Args:
            save_directory (`str`): where to.
            include_backbones (`bool` or list of part names, *optional*): `False` leaves out every frozen backbone that
                has a name to fetch it by, `True` none, a list such as `["language_model"]` all but those. By default
                the captioner stays as it is: one from `from_backbones` refers to its frozen backbones, one loaded from
                a folder keeps what that folder kept. What was trained is always written.
            kwargs: as for `PreTrainedModel.save_pretrained` (`push_to_hub`, `max_shard_size`, ...).

        Raises:
            ValueError: for a part that there is not, a quantised language model that would have to be saved, or
                adapters that PEFT put on the captioner and did not merge.
        """
        if include_backbones is None:
            included = [part for part in BACKBONES if part not in (self.config.referenced_backbones or [])]
        elif isinstance(include_backbones, bool):
            included = list(BACKBONES) if include_backbones else []
        else:
            included = list(include_backbones)
            if unknown := set(included) - set(BACKBONES):
                raise ValueError(f"`include_backbones` names {sorted(unknown)}; the backbones are {list(BACKBONES)}.")
        if "vision_model" in included:
            self.load_vision_model()
        weights = kwargs.get("state_dict")
        weights = self.state_dict() if weights is None else weights  # FSDP and DeepSpeed gather them for the caller
        if any(".base_layer." in name for name in weights) and not self._hf_peft_config_loaded:
            raise ValueError(
                "There are adapters on the captioner, which would not be found again: save the `PeftModel`, or call "
                "its `merge_and_unload()` first."
            )
        frozen, referenced = self._frozen_backbones(), []
        for part in frozen:
            name = getattr(self.config, f"{part}_name_or_path")
            if part in included or name is None:
                continue
            if self._is_as_fetched(part, weights):
                referenced.append(part)
            else:
                logger.warning(f"The {part} has other weights than {name!r} had: they are saved with the captioner.")
                for field in ("name_or_path", "revision"):  # or whoever loads and saves it next would refer to it
                    setattr(self.config, f"{part}_{field}", None)
        self._reference(referenced)
        if is_quantized(self.language_model) and "language_model" not in self.config.referenced_backbones:
            raise ValueError(
                "The weights of a quantised language model are not saved, they are rounded: refer to it by name "
                "(`include_backbones=False`), or load the captioner without `quantization_config`."
            )
        self.config.freeze_vision_model = "vision_model" in frozen
        self.config.freeze_language_model = "language_model" in frozen
        self.config.dtypes = {name: str(dtype_of(part)).removeprefix("torch.") for name, part in self.named_children()}
        if self.processor is not None and kwargs.get("is_main_process", True):
            self.processor.save_pretrained(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """As everywhere in transformers. Backbones that only this machine has go along, referred to or not."""
        local = self.local_backbones()
        self._reference([part for part in self.config.referenced_backbones or [] if part not in local])
        return super().push_to_hub(repo_id, **kwargs)

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args, **kwargs):
        """`push_to_hub` ends here: what is published names no folder of this machine."""
        path = os.path.join(working_dir, CONFIG_NAME)
        with open(path, encoding="utf-8") as file:
            config = without_local_paths(json.load(file))
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _reference(self, parts: list[str]) -> None:
        """Let saved folders refer to these parts by name instead of holding their weights."""
        self.config.referenced_backbones = parts
        # The Trainer reads it too, to tell what a checkpoint leaves out from what it lost.
        left_out = {key for key in self.state_dict() if key.split(".")[0] in parts}
        self._keys_to_ignore_on_save = left_out | set(self.all_tied_weights_keys)
