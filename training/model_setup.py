"""Captioner of a run, loaded or newly built, with its prompt."""

import itertools
import json
import os
from collections.abc import Iterable
from typing import Any, cast

import torch

from ..common.errors import UNUSABLE, InputError, one_line
from ..common.onednn import onednn_linears
from ..configuration_qformer import PrecomputedFeaturesConfig, QFormerConfig
from ..data.collator import CaptionCollator
from ..data.feature_store import FeatureStore
from ..encoders_qformer import num_frames_of, reads_videos
from ..features_qformer import mean_features
from ..hub.convert import load_qformer, load_qformer_tokenizer
from ..modeling_qformer import QFormerCaptioner
from ..processing_qformer import QFormerCaptionerProcessor
from ..vision_qformer import split_vision_inputs
from .arguments import ModelArguments
from .data_setup import TrainingData
from .from_scratch import build_from_scratch
from .quantization import quantization_config
from .run import TrainingRun


def build_model(run: TrainingRun, train_data: TrainingData) -> QFormerCaptioner:
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
        set_prompts(processor, run)
        set_num_frames(model, processor, args)
        if run.features is not None:
            run.features.check_captioner(model.config, processor.image_processor)
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


def set_num_frames(model: QFormerCaptioner, processor: QFormerCaptionerProcessor, args: ModelArguments) -> None:
    """Let the captioner read as many frames of a video as the option says. By default it keeps its own number.

    Raises:
        InputError: if its Q-Former, or its encoder of videos, tells fewer frames apart.
    """
    if args.num_frames is None:
        return
    vision_config = model.vision_model.config
    known = num_frames_of(vision_config) if reads_videos(vision_config) else model.qformer.config.num_frames
    if known is not None and args.num_frames > known:
        raise InputError(
            f"The captioner tells {known} frames apart, fewer than --num_frames {args.num_frames}: give a smaller "
            "number, or train a new captioner."
        )
    processor.num_frames = args.num_frames


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
    return QFormerCaptioner.from_backbones(
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
        **qformer_options(args),
    )


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


def qformer_fields(args: ModelArguments) -> dict[str, Any]:
    """Return the fields of a new Q-Former that the options set."""
    fields = parse_config(args.qformer_config, "qformer_config")
    if "num_frames" in fields:
        raise InputError(
            "Set the number of frames with --num_frames instead of --qformer_config, because the data needs it, too."
        )
    return fields if args.num_frames is None else {**fields, "num_frames": args.num_frames}


def load_existing(name: str, load_vision_model: bool) -> QFormerCaptioner:
    """Load a captioner to continue training.

    Args:
        name: Hub id or folder.
        load_vision_model: `False` leaves the vision encoder out of memory.
    """
    path = os.path.abspath(name) if os.path.isdir(name) else name  # absolute, because peft stores it in adapters
    return QFormerCaptioner.from_pretrained(path, load_vision_model=load_vision_model)


def backbone_dtype(dtype: str) -> str:
    """Return the dtype of pretrained backbones: "auto" is bfloat16 on GPUs that support it, otherwise float32."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def parse_config(text: str | None, name: str) -> dict:
    """Return a configuration that an option holds as JSON.

    Args:
        text: the value of the option.
        name: the option, for messages.

    Raises:
        InputError: if the text is not JSON, or not a mapping of fields to values.
    """
    try:
        config = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise InputError(f"--{name} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f'--{name} must be JSON with fields and values, such as {{"hidden_size": 384}}, not {text}.')
    return config


# ----------------------------------------------------------------------------------------------------------------------
# Before training
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def normalize_image_features(
    model: QFormerCaptioner, train_data: TrainingData, collate: CaptionCollator, num_samples: int
) -> None:
    """Fold image feature normalisation, with the statistics of the first training images, into a new Q-Former.

    Args:
        model: the captioner.
        train_data: the rows to train on.
        collate: collator of the rows.
        num_samples: number of rows to use.

    Raises:
        InputError: if there are fewer than two images.
    """
    rows = itertools.islice(iter(train_data), num_samples)
    features: list[torch.Tensor] = []
    while batch_rows := list(itertools.islice(rows, 32)):
        batch = collate(batch_rows)
        image_embeds, mask = batch.get("image_embeds"), batch.get("image_attention_mask")
        if image_embeds is None:
            vision_inputs, _ = split_vision_inputs({name: value.to(model.device) for name, value in batch.items()})
            with onednn_linears(model.device):
                outputs = model.encode_images(batch["pixel_values"].to(model.device), **vision_inputs)
            image_embeds, mask = cast(torch.Tensor, outputs.last_hidden_state), outputs.attention_mask
        features.append(mean_features(image_embeds, mask)[:, None])  # [B, 1, Dv], because rows may differ in length
    if sum(map(len, features)) < 2:
        raise InputError("--normalize_image_features_samples needs at least two training rows.")
    model.qformer.normalize_image_features(torch.cat(features))


def backbones_to_include(run: TrainingRun, model: QFormerCaptioner) -> bool | list[str]:
    """Return the frozen backbones to store in saved folders, for `save_pretrained(include_backbones=...)`."""
    if run.run_args.include_backbones == "auto":
        return model.local_backbones()
    return run.run_args.include_backbones == "true"


def check_publishable(run: TrainingRun, model: QFormerCaptioner) -> None:
    """Check that others can load a captioner that the run publishes.

    Raises:
        InputError: if it would keep backbones of a local folder by reference.
    """
    leaves_out = run.run_args.include_backbones == "false"
    if run.training_args.push_to_hub and leaves_out and model.local_backbones():
        raise InputError(
            "--include_backbones false leaves out backbones that only this machine has, so nobody could open the "
            "captioner that --push_to_hub publishes: leave out one of the two options."
        )
