"""Captioner of a run, loaded or newly built, with its prompt."""

import os
from collections.abc import Iterable
from typing import Any

import torch

from ..common.errors import UNUSABLE, InputError, one_line
from ..configuration_qformer import PrecomputedFeaturesConfig, QFormerConfig
from ..data.collator import CaptionCollator
from ..data.feature_store import FeatureStore
from ..hub.convert import load_qformer, load_qformer_tokenizer
from ..modeling_qformer import QFormerCaptioner
from ..processing_qformer import QFormerCaptionerProcessor
from .arguments import ModelArguments
from .data_setup import TrainingData
from .from_scratch import build_from_scratch
from .lora import has_adapters
from .quantization import quantization_config
from .run import TrainingRun
from .shared_setup import (
    backbone_dtype,
    check_publishable,
    normalize_image_features,
    parse_config,
    qformer_fields,
    set_num_frames,
)


def build_captioner(run: TrainingRun, train_data: TrainingData) -> QFormerCaptioner:
    """Load or build the captioner of a run, and run it on one row.

    Errors should occur here, before the run writes anything. Adapters are added later, in `lora.py`.

    Args:
        run: the run. If there are several prompts, they are given to its augmentation.
        train_data: the rows to train on. A new tokenizer and the image feature normalisation are fitted to these rows.

    Raises:
        InputError: if the captioner cannot be loaded, built, trained or published as the options ask.
    """
    args = run.model_args
    try:
        texts = zip(train_data.row_prompts(), train_data.references(), strict=True)
        train_texts = ([*filter(None, [prompt]), *captions] for prompt, captions in texts)
        model = load_captioner(args, train_texts, run.features)
        processor = model.processor
        if processor is None:
            raise InputError(
                f"The captioner {args.model_name_or_path!r} has no processor: save it together with its processor."
            )
        if args.lora_r is not None and has_adapters(model):
            raise InputError(
                f"{args.model_name_or_path!r} is an adapter, which new adapters (--lora_r) would replace: leave out "
                "--lora_r, and the adapter is trained further, or merge it with `qformer-captioner export` first."
            )
        set_prompts(processor, run)
        set_num_frames(model, processor, args)
        if run.features is not None:
            run.features.check_model(model.config, processor.image_processor)
        collate = CaptionCollator(processor, run.data_args.max_caption_length)
        with torch.no_grad():  # raises errors now, for example for a prompt that is too long
            model(**collate([next(iter(train_data))]))
    except InputError:
        raise
    except (*UNUSABLE, OSError) as error:
        raise InputError(one_line(error)) from error
    if run.training_args.fp16 and model.language_model.config.model_type in ("t5", "mt5", "umt5"):
        raise InputError("T5 overflows in float16 and its loss becomes NaN: use --bf16, or leave out --fp16.")
    check_publishable(run, model)
    quantization = quantization_config(model, args, run.run_args.include_backbones)
    if quantization is not None and args.lora_r is None:
        model.quantize_language_model(quantization)
    is_new = args.model_name_or_path is None and run.checkpoint is None
    if is_new and args.normalize_image_features_samples is not None:
        model.to(run.training_args.device)  # type: ignore[arg-type]
        normalize_image_features(model, train_data, collate, args.normalize_image_features_samples)
    return model


def set_prompts(processor: QFormerCaptionerProcessor, run: TrainingRun) -> None:
    """Set the prompt of the processor to the first prompt of the options, and let the augmentation draw from several.

    An existing captioner keeps its own prompt if the options give none.

    Raises:
        InputError: if the prompt of an existing captioner may already be in the chat template.
        ValueError: if the language model has no chat template.
    """
    args = run.model_args
    prompts = args.prompt or ([""] if args.model_name_or_path is None else [])
    if prompts:
        processor.prompt, processor.use_chat_template = prompts[0], args.use_chat_template
    elif args.use_chat_template and not processor.use_chat_template:
        raise InputError(
            f"The captioner {args.model_name_or_path!r} was trained without --use_chat_template: give its --prompt "
            "again, or leave out the option."
        )
    processor.format_prompt("")  # raises the error of a missing template now
    run.augmentation.prompts = prompts if len(prompts) > 1 else ()


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def load_captioner(
    args: ModelArguments, train_texts: Iterable[list[str]], features: FeatureStore | None = None
) -> QFormerCaptioner:
    """Load an existing captioner, join pretrained backbones, or build a captioner from scratch.

    Args:
        args: the options of the model.
        train_texts: prompt and captions of each training row, from which a captioner from scratch makes its tokenizer.
        features: precomputed features, which leave the vision encoder out of memory. With features of an unknown
            encoder, a new captioner has no vision encoder.

    Raises:
        InputError: if the options name no captioner or more than one.
        OSError: if a pretrained part cannot be downloaded or read.
    """
    backbones = [args.vision_model_name_or_path, args.language_model_name_or_path]
    configs = [args.vision_config, args.text_config]
    ways = [args.model_name_or_path is not None, any(backbones), any(configs)]
    vision = any((args.vision_model_name_or_path, args.vision_config, features and features.vision is None))
    language = any((args.language_model_name_or_path, args.text_config))
    if sum(ways) != 1 or (args.model_name_or_path is None and not (vision and language)):
        raise InputError(
            "Say which captioner to train: --model_name_or_path, or --vision_model_name_or_path with "
            "--language_model_name_or_path, or --vision_config with --text_config."
        )
    if any(configs):
        unknown = {"model_type": PrecomputedFeaturesConfig.model_type, "hidden_size": features and features.width}
        return build_from_scratch(
            parse_config(args.vision_config, "vision_config") or unknown,
            parse_config(args.text_config, "text_config"),
            qformer_fields(args),
            (text for texts in train_texts for text in texts),
            prompt=args.prompt[0] if args.prompt else "",
        )
    if any(backbones):
        return join_backbones(args, features)
    return load_existing(str(args.model_name_or_path), load_vision_model=features is None)


def join_backbones(args: ModelArguments, features: FeatureStore | None) -> QFormerCaptioner:
    """Join two pretrained backbones, or features of an unknown encoder and a language model, with a Q-Former."""
    vision = args.vision_model_name_or_path
    options = qformer_options(args)
    learned_width = options["qformer"].config.encoder_hidden_size if "qformer" in options else None
    model = QFormerCaptioner.from_backbones(
        vision,
        str(args.language_model_name_or_path),
        encoder_hidden_size=features.width if vision is None and features is not None else None,
        vision_revision=args.vision_model_revision,
        language_revision=args.language_model_revision,
        freeze_vision_model=args.freeze_vision_model,
        freeze_language_model=args.freeze_language_model,
        dtype=backbone_dtype(args.dtype),
        prompt=args.prompt[0] if args.prompt else "",
        load_vision_model=features is None,
        projection_per_query=args.projection_per_query,
        **options,
    )
    # For features of another width, attention to them is new.
    reads_learned_features = learned_width == model.qformer.config.encoder_hidden_size
    if reads_learned_features and args.normalize_image_features_samples is not None:
        raise InputError(
            "--normalize_image_features_samples changes features that the Q-Former of --qformer_name_or_path has "
            "learned to read: unset it with --normalize_image_features_samples null."
        )
    return model


def qformer_options(args: ModelArguments) -> dict[str, Any]:
    """Return the options of [`QFormerCaptioner.from_backbones`] that say which Q-Former joins the backbones.

    Args:
        args: the options of the model.

    Raises:
        InputError: if the pretrained Q-Former cannot be read or has other sizes than the options ask for.
        OSError: if the Q-Former reads the prompt and its tokenizer cannot be loaded.
    """
    fields = qformer_fields(args)
    if args.qformer_name_or_path is None:
        options, config = fields, QFormerConfig.from_fields(**fields)
    else:
        qformer = load_qformer(args.qformer_name_or_path, args.qformer_revision, args.qformer_module_name, **fields)
        options, config = {"qformer": qformer}, qformer.config
    if config.use_qformer_text_input:
        tokenizer = load_qformer_tokenizer(
            config.vocab_size,
            name=args.qformer_tokenizer,
            qformer=args.qformer_name_or_path,
            revision=args.qformer_revision,
        )
        options = {**options, "qformer_tokenizer": tokenizer}
    return options


def load_existing(name: str, load_vision_model: bool) -> QFormerCaptioner:
    """Load a captioner to continue training.

    Args:
        name: Hub id or folder.
        load_vision_model: `False` leaves the vision encoder out of memory.
    """
    path = os.path.abspath(name) if os.path.isdir(name) else name  # absolute, because peft stores it in adapters
    return QFormerCaptioner.from_pretrained(path, load_vision_model=load_vision_model)
