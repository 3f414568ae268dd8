"""What `train_hf.py` trains: the options, and the captioner that they ask for."""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..backbones_qformer import dtype_of, is_frozen
from ..common.errors import InputError
from ..data.collator import CaptionCollator
from ..modeling_qformer import QFormerCaptioner
from .arguments import ModelArguments
from .from_scratch import build_from_scratch


def check_model(args: ModelArguments) -> None:
    """Find options that cannot work before anything is loaded.

    Raises:
        InputError: for such options.
    """
    frozen = args.freeze_vision_model and args.freeze_language_model
    if args.lora_r is not None and args.lora_r < 1:
        raise InputError(f"--lora_r is the rank of the adapters and at least 1, not {args.lora_r}.")
    if not 0 <= args.lora_dropout <= 1:
        raise InputError(f"--lora_dropout is a probability, from 0 to 1, not {args.lora_dropout:g}.")
    if args.lora_r is not None and not frozen:
        raise InputError("--lora_r leaves the backbones frozen beside the adapters: leave out --freeze_... false.")
    if len(args.prompt or ()) > 1 and not all(prompt.strip() for prompt in args.prompt):
        raise InputError("One of several prompts is empty: give each some words.")
    if args.normalize_image_features_samples is not None and args.normalize_image_features_samples < 2:
        raise InputError(
            f"--normalize_image_features_samples needs two images or more, not {args.normalize_image_features_samples}."
        )


def as_config(text: str | None, name: str) -> dict:
    try:
        config = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f'--{name} must be JSON fields and values, such as {{"hidden_size": 384}}, not {text}.')
    return config


def build_model(
    args: ModelArguments, train_captions: Iterable[list[str]], load_vision_model: bool = True
) -> QFormerCaptioner:
    """The captioner that the options ask for, if need be without its vision encoder.

    Raises:
        InputError: if they ask for none, or for two.
        OSError: if a pretrained part cannot be fetched.
    """
    backbones = [args.vision_model_name_or_path, args.language_model_name_or_path]
    configs = [args.vision_config, args.text_config]
    ways = [args.model_name_or_path is not None, any(backbones), any(configs)]
    if sum(ways) != 1 or (any(backbones) and not all(backbones)) or (any(configs) and not all(configs)):
        raise InputError(
            "Say which captioner to train: --model_name_or_path, or --vision_model_name_or_path with "
            "--language_model_name_or_path, or --vision_config with --text_config."
        )
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"
    prompt = args.prompt[0] if args.prompt else ""
    qformer_config = as_config(args.qformer_config, "qformer_config")
    if all(configs):
        return build_from_scratch(
            as_config(args.vision_config, "vision_config"),
            as_config(args.text_config, "text_config"),
            qformer_config,
            (caption for captions in train_captions for caption in captions),
            prompt=prompt,
        )
    if all(backbones):
        return QFormerCaptioner.from_backbones(
            *backbones,
            vision_revision=args.vision_model_revision,
            language_revision=args.language_model_revision,
            freeze_vision_model=args.freeze_vision_model,
            freeze_language_model=args.freeze_language_model,
            dtype=dtype,
            prompt=prompt,
            load_vision_model=load_vision_model,
            projection_per_query=args.projection_per_query,
            qformer=args.qformer_name_or_path,
            qformer_revision=args.qformer_revision,
            qformer_tokenizer=args.qformer_tokenizer,
            **qformer_config,
        )
    name = args.model_name_or_path
    if os.path.isdir(name):  # peft writes it down for adapters, which are opened from elsewhere
        name = os.path.abspath(name)
    model = QFormerCaptioner.from_pretrained(name, load_vision_model=load_vision_model)
    if model.processor is None:
        raise InputError(f"The captioner {args.model_name_or_path!r} has no processor beside it.")
    return model


@torch.no_grad()
def standardize(model: QFormerCaptioner, rows: Iterable[dict], collate: CaptionCollator, number: int) -> None:
    """Fit a fresh Q-Former to the features of the first rows."""
    rows, features = itertools.islice(rows, number), []
    while some := list(itertools.islice(rows, 32)):
        batch = collate(some)
        embeds = batch.get("image_embeds")
        features.append(model.get_image_features(batch["pixel_values"].to(model.device)) if embeds is None else embeds)
    if sum(map(len, features)) < 2:  # the deviation of one is no number, and would become that of all weights
        raise InputError("--normalize_image_features_samples needs two images or more.")
    model.qformer.standardize(torch.cat(features))


def save_base_model(model: QFormerCaptioner, base: Path, included: bool | list[str]) -> None:
    """Save the fresh captioner that adapters are put on: they are nothing without it."""
    if base.exists():  # the run goes on
        return
    unfinished = base.with_suffix(".tmp")  # a kill while writing must not leave half of it
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished, include_backbones=included)
    unfinished.rename(base)


def read_quantization(
    model: QFormerCaptioner, args: ModelArguments, include_backbones: str
) -> BitsAndBytesConfig | None:
    """How the options want the language model quantised, if at all.

    Raises:
        InputError: if it cannot be, or the captioner could not be saved.
    """
    if not args.load_in_4bit and not args.load_in_8bit:
        return None
    if args.load_in_4bit and args.load_in_8bit:
        raise InputError("Choose between --load_in_4bit and --load_in_8bit.")
    if args.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise InputError(f"--bnb_4bit_quant_type must be nf4 or fp4, not {args.bnb_4bit_quant_type!r}.")
    if not is_bitsandbytes_available():
        raise InputError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install 'qformer-captioner[qlora]'.")
    if not is_frozen(model.language_model):
        raise InputError("A language model in 4 or 8 bits cannot train, only adapters on it can: leave it frozen.")
    named = model.config.language_model_name_or_path is not None
    if args.lora_r is None and (not named or include_backbones == "true"):  # an adapter refers to the whole captioner
        raise InputError(
            "Of a language model in 4 or 8 bits only the name can be saved, not the weights: leave out "
            "--include_backbones true, or add --lora_r."
        )
    return BitsAndBytesConfig(
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_compute_dtype=dtype_of(model.language_model),
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.use_bnb_nested_quant,
    )


def add_lora(model: QFormerCaptioner, args: ModelArguments) -> PeftModel:
    """Put LoRA adapters on the language model; they, the Q-Former and the projection train and are saved together.

    On one in 4 bits as on any: peft's `prepare_model_for_kbit_training` would only turn what is frozen to float32.

    Raises:
        InputError: if the language model has no layers of the names asked for.
    """
    names = [name.strip() for name in (args.lora_target_modules or "").split(",") if name.strip()]
    names = names or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.text_config.model_type)
    if names is None:
        kind = model.config.text_config.model_type
        raise InputError(f"peft knows no usual layers of a {kind!r}: name them with --lora_target_modules.")
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=rf"language_model\..*\.({'|'.join(map(re.escape, names))})",
        modules_to_save=["qformer", "language_projection"],
    )
    layers = {name.split(".")[-1] for name, _ in model.language_model.named_modules()}
    if args.lora_target_modules and (unknown := [name for name in names if name.split(".")[-1] not in layers]):
        raise InputError(f"The language model has no layers named {' or '.join(unknown)} (--lora_target_modules).")
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    return model
