"""Data sets of a run: the rows to train on and the rows to evaluate on, as the options describe them."""

import copy
from dataclasses import dataclass

import datasets
from transformers import IntervalStrategy
from transformers.trainer_utils import SaveStrategy

from ..common.errors import InputError
from ..common.logging import get_logger
from ..data.augmentation import Augmentation
from ..data.caption_forms import VizWizRules
from ..data.columns import Rows
from ..data.dataset import CaptionDataset, CaptionSource
from ..data.feature_store import FeatureStore
from ..data.image_paths import folder_of_images
from ..data.mixture import CaptionMixture
from ..data.skip_limit import SkipLimit
from ..data.skipped_rows import SkippedRows
from ..data.splits import default_eval_split, load_eval_split, load_splits
from ..data.streaming import CaptionStream
from .arguments import DataArguments
from .run import TrainingRun
from .training_arguments import QFormerTrainingArguments

logger = get_logger(__name__)

TrainingData = CaptionDataset | CaptionMixture | CaptionStream


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of the options, with the columns of its images and captions.

    Args:
        name: Hub id, folder, file or "scenes".
        config_name: configuration of the data set.
        revision: branch, tag or commit on the Hub.
        image_column: column of images or of their paths.
        caption_column: column of captions.
        image_folder: folder that paths in the image column are relative to; by default the folder of the data set.
        prompt_column: column of prompts, if rows have their own.
    """

    name: str
    config_name: str | None = None
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "caption"
    image_folder: str | None = None
    prompt_column: str | None = None


def training_specs(args: DataArguments) -> list[DatasetSpec]:
    """Return the data sets to train on.

    Raises:
        InputError: if the number of values of an option is neither one nor the number of data sets.
    """
    names = args.dataset_name or []

    def values(option: str, default: str | None = None) -> list:
        given = getattr(args, option) or [default]
        if len(given) not in (1, len(names)):
            raise InputError(
                f"--{option} has {len(given)} values for {len(names)} data sets: give one value for each, or one "
                "for all."
            )
        return given if len(given) > 1 else given * len(names)

    columns = zip(
        names,
        values("dataset_config_name"),
        values("dataset_revision"),
        values("image_column", "image"),
        values("caption_column", "caption"),
        values("image_folder"),
        values("prompt_column"),
        strict=True,
    )
    return [DatasetSpec(*fields) for fields in columns]


def evaluation_spec(args: DataArguments) -> DatasetSpec:
    """Return the data set to evaluate on: `--eval_dataset_name`, or the first data set to train on."""
    first = training_specs(args)[0]
    if args.eval_dataset_name is None:
        return first
    return DatasetSpec(
        args.eval_dataset_name,
        args.eval_dataset_config_name,
        args.eval_dataset_revision,
        args.eval_image_column or first.image_column,
        args.eval_caption_column or first.caption_column,
        args.eval_image_folder or first.image_folder,
        args.eval_prompt_column or first.prompt_column,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def load_data(run: TrainingRun) -> tuple[TrainingData, CaptionDataset | None]:
    """Load the data of a run, and adapt its evaluation and saving strategies to the data.

    Args:
        run: the run. A stream has no epochs, so it is evaluated and saved by steps. Without rows to evaluate on, the
            last checkpoint is kept instead of the best one.

    Raises:
        InputError: if a data set cannot be loaded, or lacks a split or a column that the options name.
    """
    args = run.training_args
    train_data, eval_data = load_datasets(
        run.data_args,
        run.features,
        run.skipped_rows,
        run.augmentation,
        args.process_index,
        args.world_size,
        run.num_frames,
    )
    if run.data_args.streaming:
        replace_epochs_by_steps(args)
    if eval_data is None:
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        logger.info("There is no split to evaluate on: nothing is evaluated, and the last checkpoint is kept.")
    elif len(eval_data) == 1:
        logger.info("There is only one row to evaluate on: eval_loss_shuffled will equal eval_loss.")
    return train_data, eval_data


def replace_epochs_by_steps(args: QFormerTrainingArguments) -> None:
    """Replace evaluation and saving per epoch by ten times per run, because a stream has no epochs."""
    steps = max(1, args.max_steps // 10)
    if args.eval_strategy == IntervalStrategy.EPOCH:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, steps
        logger.info("A stream has no epochs: --eval_strategy is steps, --eval_steps %d.", steps)
    if args.save_strategy == SaveStrategy.EPOCH:
        args.save_strategy, args.save_steps = SaveStrategy.STEPS, steps
        logger.info("A stream has no epochs: --save_strategy is steps, --save_steps %d.", steps)


def load_datasets(
    args: DataArguments,
    features: FeatureStore | None,
    skipped: SkippedRows,
    augmentation: Augmentation,
    process: int = 0,
    processes: int = 1,
    num_frames: int = 1,
) -> tuple[TrainingData, CaptionDataset | None]:
    """Load the rows to train on, and the rows to evaluate on if there are any.

    Args:
        args: the options of the data.
        features: precomputed image features to read instead of images.
        skipped: record of the rows that cannot be used.
        augmentation: augmentation of the training rows.
        process, processes: index of this process and number of processes, which share the rows of a stream.
        num_frames: largest number of frames to read of a video.

    Raises:
        InputError: if a data set cannot be loaded, or lacks a split or a column that the options name.
    """
    train_rows, eval_rows = load_rows(args, features, skipped)
    sources = training_sources(args, train_rows, num_frames)
    if args.streaming:
        stream = CaptionStream(
            sources,
            skipped,
            augmentation,
            weights=args.dataset_weights,
            shuffle_buffer=args.shuffle_buffer,
            max_rows=args.max_train_samples,
            process_index=process,
            num_processes=processes,
        )
        if process == 0:
            stream.check_images(SkipLimit(args.max_skipped))
        return stream, evaluation_data(args, eval_rows, features, skipped, num_frames)
    split_features = None if features is None else features.split(args.train_split)
    parts = [CaptionDataset(source, skipped, augmentation, split_features) for source in sources]
    for part in parts if process == 0 else []:  # the other processes wait for this one before they train
        part.check_images(SkipLimit(args.max_skipped))
    eval_data = evaluation_data(args, eval_rows, features, skipped, num_frames)
    if eval_data is None and args.train_val_split is not None:
        eval_data = hold_out(parts[0], args.train_val_split, args.max_eval_samples)
    if len(parts) == 1:
        return parts[0], eval_data
    return CaptionMixture(parts, args.dataset_weights or [1.0] * len(parts)), eval_data


def load_rows(
    args: DataArguments, features: FeatureStore | None, skipped: SkippedRows
) -> tuple[list[Rows], datasets.Dataset | None]:
    """Load the training rows of each data set and the evaluation rows.

    An evaluation split of the first data set is loaded together with its training split.
    """
    eval_split = evaluation_split(args, features)
    rules = VizWizRules(args.ignore_rejected, args.ignore_precanned)
    first_is_evaluated = args.eval_dataset_name is None and (features is None or eval_split is not None)
    train_rows, eval_rows = [], None
    for number, spec in enumerate(training_specs(args)):
        rows, held_out_rows = load_splits(
            spec.name,
            spec.config_name,
            args.train_split,
            eval_split,
            args.split_column,
            args.max_train_samples,
            args.max_eval_samples,
            revision=spec.revision,
            streaming=args.streaming,
            evaluate=number == 0 and first_is_evaluated,
            skipped=skipped,
            rules=rules,
        )
        train_rows.append(rows)
        eval_rows = held_out_rows if number == 0 else eval_rows
    if args.eval_dataset_name is not None:
        spec = evaluation_spec(args)
        eval_rows = load_eval_split(
            spec.name,
            spec.config_name,
            args.eval_split,
            args.split_column,
            args.max_eval_samples,
            revision=spec.revision,
            streaming=args.streaming,
            skipped=skipped,
            rules=rules,
        )
    return train_rows, eval_rows


def evaluation_split(args: DataArguments, features: FeatureStore | None) -> str | None:
    """Return the name of the split to evaluate on, or `None` for the default of the data set."""
    if args.eval_split is not None or features is None:
        return args.eval_split
    return default_eval_split(features.layouts)


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ----------------------------------------------------------------------------------------------------------------------


def training_sources(args: DataArguments, train_rows: list[Rows], num_frames: int) -> list[CaptionSource]:
    """Return the training rows of each data set, with the columns that hold images and captions."""
    specs = training_specs(args)
    return [
        CaptionSource(
            args.train_split if len(specs) == 1 else f"{args.train_split} of {spec.name}",
            rows,
            spec.image_column,
            spec.caption_column,
            args.image_id_column,
            folder_of_images(spec.name, rows, spec.image_folder, args.allowed_image_folders),
            prompt_column=spec.prompt_column,
            num_frames=num_frames,
        )
        for spec, rows in zip(specs, train_rows, strict=True)
    ]


def evaluation_data(
    args: DataArguments,
    eval_rows: datasets.Dataset | None,
    features: FeatureStore | None,
    skipped: SkippedRows,
    num_frames: int,
) -> CaptionDataset | None:
    """Return the rows to evaluate on without unreadable images, or `None` without `eval_rows`."""
    if eval_rows is None:
        return None
    spec, split = evaluation_spec(args), evaluation_split(args, features) or "evaluation"
    source = CaptionSource(
        split,
        eval_rows,
        spec.image_column,
        spec.caption_column,
        args.image_id_column,
        folder_of_images(spec.name, eval_rows, spec.image_folder, args.allowed_image_folders),
        option_prefix="" if args.eval_dataset_name is None else "eval_",
        prompt_column=spec.prompt_column,
        num_frames=num_frames,
    )
    split_features = None if features is None else features.split(split)
    return CaptionDataset(source, skipped, features=split_features).drop_unreadable(SkipLimit(args.max_skipped))


def hold_out(train_data: CaptionDataset, share: float, max_eval_samples: int | None) -> CaptionDataset:
    """Move the last rows of the training data to a new data set for evaluation, and return it.

    The last rows are used instead of random rows, so that the captions of an image, which are usually adjacent, stay
    together. The rounds of a conversation always do.

    Args:
        train_data: the training rows. The held-out rows are removed from them.
        share: share of the rows to hold out, above 0 and below 1.
        max_eval_samples: largest number of rows to evaluate on. Further held-out rows are not used.

    Raises:
        InputError: if the share leaves no row to train on or no row to evaluate on.
    """
    first = len(train_data) - round(share * len(train_data))
    rows = [train_data.row_of[index] for index in train_data.indices]
    while 0 < first < len(rows) and rows[first - 1] == rows[first]:
        first -= 1
    if not 0 < first < len(train_data):
        raise InputError(
            f"--train_val_split {share:g} of {len(train_data)} training rows leaves no row to "
            f"{'train' if first <= 0 else 'evaluate'} on: choose another share."
        )
    eval_data = copy.copy(train_data)
    eval_data.augmentation = Augmentation()
    train_data.indices, eval_data.indices = train_data.indices[:first], train_data.indices[first:][:max_eval_samples]
    return eval_data.drop_unreadable()
