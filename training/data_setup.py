"""What `train_hf.py` trains and evaluates on: the options, and the data sets that they ask for."""

import copy
import os

from ..common.errors import InputError
from ..data.augmentation import Augmentation, check_image_augmentation
from ..data.dataset import CaptionDataset, CaptionSource
from ..data.feature_store import FeatureStore
from ..data.images import folder_of_images
from ..data.mixture import CaptionMixture
from ..data.skipped_rows import SkippedRows
from ..data.splits import default_eval_split, load_eval_split, load_splits
from ..data.streaming import CaptionStream
from .arguments import DataArguments, of_each


def check_data(args: DataArguments, store: FeatureStore | None, max_steps: int) -> None:
    """Find options that do not go together before anything is loaded.

    Raises:
        InputError: for such options.
    """
    sets, weights = len(args.dataset_name), args.dataset_weights
    if weights is not None and (len(weights) != sets or not all(0 < weight < float("inf") for weight in weights)):
        raise InputError(f"--dataset_weights must be {sets} numbers above 0, one for each data set, not {weights}.")
    if store is not None and (args.streaming or sets > 1 or args.eval_dataset_name is not None):
        raise InputError("--features are of one data set, and not of a stream: leave out --features, or the others.")
    if args.streaming and max_steps < 1:
        raise InputError("A stream has no end: say how long to train on it with --max_steps.")
    if args.streaming and args.image_id_column is not None:
        raise InputError("--image_id_column gathers rows from all of a data set, and a stream is never there in full.")
    if args.streaming and args.train_val_split is not None:
        raise InputError("--train_val_split counts rows, and a stream is never there in full: use --eval_dataset_name.")
    if args.eval_dataset_name is None:
        for name in ("dataset_config_name", "dataset_revision", "image_column", "caption_column", "image_folder"):
            if getattr(args, f"eval_{name}") is not None:
                raise InputError(f"--eval_{name} says something of --eval_dataset_name: give that, too.")
    if args.eval_image_folder is not None and not os.path.isdir(args.eval_image_folder):
        raise InputError(f"There is no folder of images {args.eval_image_folder!r} (--eval_image_folder).")
    check_image_augmentation(args.random_resized_crop_scale, args.horizontal_flip_prob)
    for name in ("captions_per_image", "max_train_samples", "max_eval_samples"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name} is at least 1, not {value}.")
    if args.train_val_split is not None and not 0 <= args.train_val_split <= 1:
        raise InputError(f"--train_val_split is a share of the rows, from 0 to 1, not {args.train_val_split:g}.")
    if args.max_caption_length < 2:
        raise InputError(f"--max_caption_length is at least 2, a word and the end, not {args.max_caption_length}.")
    if args.shuffle_buffer < 0:
        raise InputError(f"--shuffle_buffer is a number of rows, or 0 to keep their order, not {args.shuffle_buffer}.")


def load_data(
    args: DataArguments,
    store: FeatureStore | None,
    skipped: SkippedRows,
    augmentation: Augmentation,
    process: int = 0,
    processes: int = 1,
) -> tuple[CaptionDataset | CaptionMixture | CaptionStream, CaptionDataset | None]:
    """The rows to train on, and those to evaluate on if there are any.

    Raises:
        InputError: if they cannot be loaded.
    """
    parts, sources, evaluation = [], [], None
    names = args.dataset_name
    for number, (name, config, revision, image_column, caption_column, image_folder) in enumerate(
        zip(
            names,
            of_each(args, "dataset_config_name"),
            of_each(args, "dataset_revision"),
            of_each(args, "image_column", "image"),
            of_each(args, "caption_column", "caption"),
            of_each(args, "image_folder"),
            strict=True,
        )
    ):
        eval_split = args.eval_split
        if store is not None and eval_split is None:  # of the splits that there are features of
            eval_split = default_eval_split(store.layouts)
        train_rows, eval_rows = load_splits(
            name,
            config,
            args.train_split,
            eval_split,
            args.split_column,
            args.max_train_samples,
            args.max_eval_samples,
            revision=revision,
            streaming=args.streaming,
            evaluate=number == 0 and args.eval_dataset_name is None and (store is None or eval_split is not None),
        )
        folder = folder_of_images(name, train_rows, image_folder)
        label = args.train_split if len(names) == 1 else f"{args.train_split} of {name}"
        source = CaptionSource(label, train_rows, image_column, caption_column, args.image_id_column, folder)
        if args.streaming:
            sources.append(source)
        else:
            features = store and store.split(args.train_split)
            parts.append(CaptionDataset(source, skipped, augmentation, features))
        if number == 0:
            if args.eval_dataset_name is not None:
                eval_rows = load_eval_split(
                    args.eval_dataset_name,
                    args.eval_dataset_config_name,
                    args.eval_split,
                    args.split_column,
                    args.max_eval_samples,
                    revision=args.eval_dataset_revision,
                    streaming=args.streaming,
                )
                folder = folder_of_images(args.eval_dataset_name, eval_rows, args.eval_image_folder or image_folder)
                image_column = args.eval_image_column or image_column
                caption_column = args.eval_caption_column or caption_column
            if eval_rows is not None:
                split = eval_split or "evaluation"
                features = store and store.split(split)
                prefix = "" if args.eval_dataset_name is None else "eval_"
                columns = (image_column, caption_column, args.image_id_column)
                source = CaptionSource(split, eval_rows, *columns, folder, option_prefix=prefix)
                evaluation = CaptionDataset(source, skipped, features=features).drop_unreadable()
    if args.streaming:
        stream = CaptionStream(
            sources,
            skipped,
            augmentation,
            args.dataset_weights,
            args.shuffle_buffer,
            args.max_train_samples,
            process,
            processes,
        )
        return stream, evaluation
    if evaluation is None and args.train_val_split is not None:
        evaluation = hold_out(parts[0], args.train_val_split, args.max_eval_samples)
    if len(parts) > 1:
        return CaptionMixture(parts, args.dataset_weights or [1.0] * len(parts)), evaluation
    return parts[0], evaluation


def hold_out(train_data: CaptionDataset, share: float, max_eval_samples: int | None) -> CaptionDataset:
    """Take the last rows out of the training data, to evaluate on.

    Not drawn ones: where a row is a caption, those of one image stand side by side.

    Raises:
        InputError: for a share that leaves one of the two without rows.
    """
    first = len(train_data) - round(share * len(train_data))
    if not 0 < first < len(train_data):
        raise InputError(
            f"--train_val_split is the share of the {len(train_data)} training rows to hold out; with {share:g} none "
            f"are left to {'train' if first <= 0 else 'evaluate'} on."
        )
    eval_data = copy.copy(train_data)
    eval_data.augmentation = Augmentation()
    train_data.indices, eval_data.indices = train_data.indices[:first], train_data.indices[first:][:max_eval_samples]
    return eval_data.drop_unreadable()
