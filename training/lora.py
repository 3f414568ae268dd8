"""LoRA adapters on the language model, and their base captioner."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import InputError
from ..modeling_qformer import QFormerCaptioner
from ..saving_qformer import QFormerPreTrainedModel
from .arguments import ModelArguments
from .quantization import quantization_config
from .run import TrainingRun
from .shared_setup import backbones_to_include

if TYPE_CHECKING:
    from peft import PeftModel


def without_adapters(model: "QFormerPreTrainedModel | PeftModel") -> QFormerPreTrainedModel:
    """Return the base model of an adapter. A model without adapters is returned unchanged."""
    if isinstance(model, QFormerPreTrainedModel):
        return model
    base = model.get_base_model()
    assert isinstance(base, QFormerPreTrainedModel)
    return base


def captioner_of(model: "QFormerPreTrainedModel | PeftModel") -> QFormerCaptioner:
    """Return the base captioner of an adapter. A captioner is returned unchanged."""
    captioner = without_adapters(model)
    assert isinstance(captioner, QFormerCaptioner)
    return captioner


def has_adapters(model: QFormerPreTrainedModel) -> bool:
    """Return True for a model that was loaded from the folder of an adapter."""
    return bool(model._hf_peft_config_loaded)


def with_adapters(run: TrainingRun, model: QFormerPreTrainedModel) -> "QFormerPreTrainedModel | PeftModel":
    """Return the model of a run with its adapters, new ones or those that it was loaded with, if it has any.

    Args:
        run: the run.
        model: the model as `build_model` returns it.

    Raises:
        InputError: if the language model has no layers with the names in the options.
        OSError: if the base captioner of an adapter cannot be read.
    """
    if run.model_args.lora_r is not None:
        return add_adapters(run, captioner_of(model))
    return continue_adapters(run, captioner_of(model)) if has_adapters(model) else model


def continue_adapters(run: TrainingRun, captioner: QFormerCaptioner) -> "PeftModel":
    """Return the adapter that `--model_name_or_path` names, trainable, on its base captioner.

    Args:
        run: the run.
        captioner: the captioner as it was loaded, whose weights could not be saved as an adapter again.

    Raises:
        OSError: if the base captioner cannot be read.
    """
    from peft import PeftConfig, PeftModel

    adapter = str(run.model_args.model_name_or_path)
    base = QFormerCaptioner.from_pretrained(
        str(PeftConfig.from_pretrained(adapter).base_model_name_or_path), load_vision_model=run.features is None
    )
    base.processor = captioner.processor
    quantization = quantization_config(base, run.model_args, run.run_args.include_backbones)
    if quantization is not None:
        base.quantize_language_model(quantization)
    return PeftModel.from_pretrained(base, adapter, is_trainable=True)


def add_adapters(run: TrainingRun, captioner: QFormerCaptioner) -> "PeftModel":
    """Add adapters to the captioner of a run, and save the base captioner in the folder `base`.

    An adapter needs the captioner that it was trained on. A new captioner is therefore saved before its language model
    is quantised. An existing captioner is already in a folder or on the Hub.

    Raises:
        InputError: if the language model has no layers with the names in the options.
    """
    quantization = quantization_config(captioner, run.model_args, run.run_args.include_backbones)
    if run.model_args.model_name_or_path is None:
        # peft records this path in the adapter. It is absolute, because adapters are also loaded from other working
        # folders.
        base = (run.output_dir / "base").absolute()
        if run.is_main_process:
            save_base_model(captioner, base, backbones_to_include(run, captioner))
        run.wait_for_everyone()
        captioner = QFormerCaptioner.from_pretrained(base, load_vision_model=run.features is None)
    if quantization is not None:
        captioner.quantize_language_model(quantization)
    return add_lora(captioner, run.model_args)


def save_base_model(model: QFormerCaptioner, base: Path, include_backbones: bool | list[str]) -> None:
    """Save the base captioner of adapters, unless the same run has saved it before a kill.

    Args:
        model: the captioner without adapters.
        base: the folder to write. It is written atomically.
        include_backbones: backbones whose weights to store, as in [`~QFormerCaptioner.save_pretrained`].
    """
    if base.exists():
        return
    unfinished = base.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, include_backbones=include_backbones)
    unfinished.rename(base)


def add_lora(model: QFormerCaptioner, args: ModelArguments) -> "PeftModel":
    """Add LoRA adapters to the language model. They are trained and saved with the Q-Former and the projection.

    A quantised language model needs no further preparation: peft's `prepare_model_for_kbit_training` would only convert
    frozen weights to float32.

    Args:
        model: the captioner.
        args: the options of the model.

    Raises:
        InputError: if the language model has no layers with the names in the options.
    """
    from peft import LoraConfig, get_peft_model

    assert args.lora_r is not None
    names = "|".join(map(re.escape, layers_to_adapt(model, args.lora_target_modules)))
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=rf"language_model\..*\.({names})",
        modules_to_save=["qformer", "language_projection"],
    )
    return get_peft_model(model, config)


def layers_to_adapt(model: QFormerCaptioner, target_modules: str | None) -> list[str]:
    """Return the names of the layers that receive adapters.

    Args:
        model: the captioner.
        target_modules: names separated by commas; by default peft's choice for the language model.

    Raises:
        InputError: if a name is not a layer of the language model, or peft has no default for the model type.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    names = [name.strip() for name in (target_modules or "").split(",") if name.strip()]
    if not names:
        kind = model.language_model.config.model_type
        if kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise InputError(
                f"peft has no default layers for a language model of type {kind!r}: name them with "
                "--lora_target_modules."
            )
        return list(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind])
    existing = {name.split(".")[-1] for name, _ in model.language_model.named_modules()}
    if unknown := [name for name in names if name.split(".")[-1] not in existing]:
        raise InputError(f"The language model has no layers named {' or '.join(unknown)} (--lora_target_modules).")
    return names
