"""Model of a run that pretrains a Q-Former (stage 1 of BLIP-2), loaded or newly built."""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from transformers import IntervalStrategy, PreTrainedTokenizerBase

from ..common.errors import UNUSABLE, InputError, one_line
from ..common.logging import get_logger
from ..data.collator import PretrainingCollator
from ..data.dataset import CaptionDataset
from ..data.images import frames_of, id_of_image
from ..hub.convert import load_qformer, load_qformer_tokenizer
from ..pretraining_qformer import QFormerForPretraining
from .arguments import ModelArguments
from .checks import check_best_model_score, pretraining_scores
from .data_setup import TrainingData
from .from_scratch import pretraining_from_scratch, train_text_tokenizer
from .run import TrainingRun
from .shared_setup import (
    backbone_dtype,
    check_publishable,
    normalize_image_features,
    parse_config,
    qformer_fields,
    set_num_frames,
)

logger = get_logger(__name__)

VOCAB_SIZE = 8192  # of a new tokenizer
TRIED_ROWS = 2  # the fewest that have wrong pairs
CHECKED_PROMPTS = 1000  # rows of a stream are read for it

# Options that are fields of the configuration. Those that are not given keep the values of the model.
CONFIG_FIELDS = ("image_text_hidden_size", "itc_loss", "itc_weight", "itm_weight", "itg_weight", "label_smoothing")


def build_pretraining_model(
    run: TrainingRun, train_data: TrainingData, eval_data: CaptionDataset | None
) -> QFormerForPretraining:
    """Load or build the model of a run that pretrains, and run it on two rows.

    Errors should occur here, before the run writes anything.

    Args:
        run: the run.
        train_data: the rows to train on. A new tokenizer and the image feature normalisation are fitted to these rows.
        eval_data: the rows to evaluate on, if there are any.

    Raises:
        InputError: if the rows cannot teach to compare, or if the model cannot be loaded, built, trained or published
            as the options ask.
    """
    args = run.model_args
    evaluates = run.training_args.eval_strategy != IntervalStrategy.NO
    check_rows(train_data, eval_data if evaluates else None, run.training_args.world_size)
    try:
        model = load_pretraining_model(run, train_data.references())
        processor = model.processor
        if processor is None:
            raise InputError(
                f"The model {args.model_name_or_path!r} has no processor: save it together with its processor."
            )
        check_best_model_score(run.training_args, pretraining_scores(model.config))
        check_depth(model)
        set_num_frames(model, processor, args)
        if run.features is not None:
            run.features.check_model(model.config, processor.image_processor)
        check_text_length(model, run.data_args.max_caption_length)
        collate = PretrainingCollator(processor, run.data_args.max_caption_length)
        with torch.no_grad():
            model(**collate(list(itertools.islice(iter(train_data), TRIED_ROWS))))
    except InputError:
        raise
    except (*UNUSABLE, OSError) as error:
        raise InputError(one_line(error)) from error
    check_publishable(run, model)
    is_new = args.model_name_or_path is None and run.checkpoint is None
    if is_new and args.normalize_image_features_samples is not None:
        model.to(run.training_args.device)  # type: ignore[arg-type]
        normalize_image_features(model, train_data, collate, args.normalize_image_features_samples)
    return model


def check_depth(model: QFormerForPretraining) -> None:
    """Check that the texts of generation see the image.

    In each layer, texts attend to the queries before the queries attend to the image.

    Raises:
        InputError: if the Q-Former has one layer.
    """
    if model.config.itg_weight and model.qformer.config.num_hidden_layers < 2:
        raise InputError(
            "Text generation needs a Q-Former of at least 2 layers: in the first, texts attend to queries that have "
            "not seen the image. Set num_hidden_layers in --qformer_config, or --itg_weight 0."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def load_pretraining_model(run: TrainingRun, train_texts: Iterable[list[str]]) -> QFormerForPretraining:
    """Load an existing model, or build a new one on a pretrained vision encoder or from scratch.

    Args:
        run: the run. Its precomputed features leave the vision encoder out of memory. With features of an unknown
            encoder, a new model has no vision encoder.
        train_texts: captions of each training row, from which a new tokenizer is made.

    Raises:
        InputError: if the options name no model or more than one.
        OSError: if a pretrained part cannot be downloaded or read.
    """
    args, features = run.model_args, run.features
    unknown_encoder = features is not None and features.vision is None
    ways = [args.model_name_or_path, args.vision_model_name_or_path, args.vision_config, unknown_encoder or None]
    if args.model_name_or_path is not None and args.vision_model_name_or_path is None and args.vision_config is None:
        return load_existing(run)
    if sum(way is not None for way in ways) != 1:
        raise InputError(
            "Say which model to pretrain: --model_name_or_path, --vision_model_name_or_path, or --vision_config to "
            "train a vision encoder from scratch. --features may replace the vision encoder."
        )
    if args.text_model_name_or_path is not None and args.vision_config is not None:
        raise InputError(
            "--vision_config trains all parts from scratch: leave out --text_model_name_or_path, or give a pretrained "
            "--vision_model_name_or_path."
        )
    if args.text_model_name_or_path is None:
        return build_with_new_tokenizer(run, (text for texts in train_texts for text in texts))
    qformer = load_qformer(args.text_model_name_or_path, args.text_model_revision, **qformer_fields(args))
    tokenizer = load_qformer_tokenizer(
        qformer.config.vocab_size, qformer=args.text_model_name_or_path, revision=args.text_model_revision
    )
    return on_pretrained_vision(run, tokenizer, qformer=qformer)


def build_with_new_tokenizer(run: TrainingRun, texts: Iterable[str]) -> QFormerForPretraining:
    """Return a model whose Q-Former has new weights, and whose tokenizer is made from texts."""
    args = run.model_args
    tokenizer = train_text_tokenizer(
        texts, args.tokenizer_vocab_size or VOCAB_SIZE, lowercase=args.tokenizer_lowercase is not False
    )
    if args.vision_config is None:
        return on_pretrained_vision(run, tokenizer, **qformer_fields(args))
    vision_config = parse_config(args.vision_config, "vision_config")
    return pretraining_from_scratch(vision_config, qformer_fields(args), tokenizer, **config_fields(args))


def on_pretrained_vision(run: TrainingRun, tokenizer: PreTrainedTokenizerBase, **qformer: Any) -> QFormerForPretraining:
    """Put a Q-Former behind the pretrained vision encoder of the options, or behind features of an unknown encoder.

    Args:
        run: the run.
        tokenizer: tokenizer of the texts.
        qformer: `qformer`, or fields of a new one.
    """
    args, features = run.model_args, run.features
    return QFormerForPretraining.from_backbones(
        args.vision_model_name_or_path,
        tokenizer,
        encoder_hidden_size=features.width if features is not None and features.vision is None else None,
        vision_revision=args.vision_model_revision,
        freeze_vision_model=args.freeze_vision_model,
        dtype=backbone_dtype(args.dtype),
        load_vision_model=features is None,
        **config_fields(args),
        **qformer,
    )


def load_existing(run: TrainingRun) -> QFormerForPretraining:
    """Load a model of stage 1 to continue its training, also a `Blip2ForImageTextRetrieval`.

    Raises:
        InputError: if the options describe a new model, too.
    """
    args = run.model_args
    for name in ("text_model_name_or_path", "image_text_hidden_size", "qformer_config"):
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name} describes a new model, but --model_name_or_path has one: leave out one of the two."
            )
    return QFormerForPretraining.from_pretrained(
        str(args.model_name_or_path), load_vision_model=run.features is None, **config_fields(args)
    )


def config_fields(args: ModelArguments) -> dict[str, Any]:
    """Return the fields of the configuration that the options set."""
    return {name: getattr(args, name) for name in CONFIG_FIELDS if getattr(args, name) is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------


def check_rows(train_data: TrainingData, eval_data: CaptionDataset | None, processes: int) -> None:
    """Check that the rows have different images and texts, of which wrong pairs can be made.

    Args:
        train_data: the rows to train on.
        eval_data: the rows to evaluate on, if there are any.
        processes: number of processes, each of which evaluates rows.

    Raises:
        InputError: if they have not, or if rows have prompts, which pretraining does not read.
    """
    named = {"train": train_data} if eval_data is None else {"train": train_data, "evaluate": eval_data}
    for purpose, data in named.items():
        if data is eval_data and len(data) < max(2, processes):
            raise InputError(
                f"There are {len(data)} rows to evaluate on, and wrong pairs need {max(2, processes)} (one for each "
                "process): give more rows, or --eval_strategy no."
            )
        if any(itertools.islice(data.row_prompts(), CHECKED_PROMPTS)):
            raise InputError(
                f"Rows to {purpose} on have prompts, such as the questions of a conversation, and pretraining reads "
                "only captions: name a column of captions with --caption_column."
            )
        if has_one(text for texts in data.references() for text in texts):
            raise InputError(
                f"All captions to {purpose} on are equal, so no wrong pair can be made: give images with different "
                "captions, or another --caption_column."
            )
        if isinstance(data, CaptionDataset) and has_one_image(data):
            raise InputError(
                f"All rows to {purpose} on have the same image, so no wrong pair can be made: give different images, "
                "or another --image_column."
            )
        if isinstance(data, CaptionDataset):
            warn_of_repeated_images(data)


def warn_of_repeated_images(data: CaptionDataset) -> None:
    """Log a warning if several rows have the same file as image, because each counts as wrong for the other's captions.

    Images that the rows themselves hold are not compared, because all of them would have to be read.
    """
    column = data.source.image_column
    first = None if data.images is None else data.images[data.row_of[data.indices[0]]][column]
    if data.images is None or not isinstance(first, dict) or first["bytes"] is not None:
        return
    paths = [cell and cell["path"] for cell in data.images[column]]
    used = [paths[data.row_of[index]] for index in data.indices]
    if repeated := len(used) - len(set(used)):
        logger.warning(
            "%d of %d rows of the %s split have the image of another row, and count as wrong for its captions: merge "
            "the captions of an image with --image_id_column %s.",
            repeated,
            len(used),
            data.split,
            column,
        )


def has_one(values: Iterable[Any]) -> bool:
    """Return True if all values are equal, and read no further than the first other value."""
    values = iter(values)
    first = next(values, None)
    return all(value == first for value in values)


def has_one_image(data: CaptionDataset) -> bool:
    """Return True if all rows have the same image. Rows whose images are not stored count as different."""
    if data.images is None or len(data) < 2:
        return len(data) < 2
    cells = (data.images[data.row_of[index]][data.source.image_column] for index in data.indices)
    return has_one([id_of_image(frame) for frame in frames_of(cell)] for cell in cells)


def check_text_length(model: QFormerForPretraining, max_caption_length: int) -> None:
    """Check that the Q-Former reads texts of the length that the options allow.

    Raises:
        InputError: if it reads only shorter texts.
    """
    longest = model.qformer.config.max_position_embeddings
    if max_caption_length > longest:
        raise InputError(
            f"The Q-Former reads texts of at most {longest} tokens: give --max_caption_length {longest} or less, at "
            "which longer captions are cut."
        )
