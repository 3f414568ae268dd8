"""What `train_hf.py` trains and evaluates on: the options, and the data sets that they ask for."""

import copy
import os
from dataclasses import dataclass

from . import InputError
from .data import CaptionDataset, SkippedRows, Variations, check_crop, check_flip
from .features import FeatureStore
from .mixing import CaptionMixture
from .options import option
from .sources import EVAL_SPLITS, folder_of_images, load_held_out, load_splits
from .streams import CaptionStream, StreamSource


@dataclass
class DataArguments:
    """Which captions of which images."""

    dataset_name: list[str] | None = option(
        None, 'Data sets: Hub ids, folders, files (parquet, JSON, CSV, tar; wildcards), or "scenes" for drawn pictures.'
    )
    dataset_weights: list[float] | None = option(None, "Of several: their shares of the rows; by default equal ones.")
    dataset_config_name: list[str] | None = option(None, "Which configuration of each, or of all.")
    dataset_revision: list[str] | None = option(None, "Branch, tag or commit of each on the Hub, or of all.")
    eval_dataset_name: str | None = option(None, "Evaluate on this data set; by default on the first one.")
    eval_dataset_config_name: str | None = option(None, "Which of its configurations.")
    eval_dataset_revision: str | None = option(None, "Its branch, tag or commit on the Hub.")
    eval_image_column: str | None = option(None, "Its column of images, or of paths; by default the first data set's.")
    eval_caption_column: str | None = option(None, "Its column of captions; by default the first data set's.")
    eval_image_folder: str | None = option(
        None, "Where paths in its image column start; by default as for the first data set."
    )
    streaming: bool = option(False, "Read rows while training goes on, and keep none. Needs --max_steps.")
    shuffle_buffer: int = option(1000, "Shuffle so many rows of a stream among each other, and its files.")
    train_split: str = option("train", "The split to train on.")
    eval_split: str | None = option(None, "The split to evaluate on; by default validation, val, dev or test.")
    split_column: str = option("split", "Where one split holds all rows: the column that tells the splits.")
    image_column: list[str] | None = option(
        None, 'The column of images, or of paths, of each data set, or of all; by default "image".'
    )
    caption_column: list[str] | None = option(
        None, 'The column of captions: a string or a list in each row, also inside another (a.b). By default "caption".'
    )
    image_id_column: str | None = option(
        None, "Rows with the same value in this column are captions of one image: train on them in one pass."
    )
    image_folder: list[str] | None = option(
        None, "Where paths in the image column start, of each data set, or of all; by default where the file lies."
    )
    train_val_split: float | None = option(
        None, "Where there is no split to evaluate on: hold out this share of the training rows, the last ones."
    )
    max_train_samples: int | None = option(None, "Train on so many rows of each data set; of scenes: draw so many.")
    max_eval_samples: int | None = option(None, "Evaluate on so many rows only; of scenes: draw so many.")
    smallest_crop: float | None = option(
        None, "Train on random crops that keep at least this share of an image's area; by default on whole images."
    )
    captions_per_image: int | None = option(
        None, "Draw so many captions of an image each time it is seen; by default train on all of them."
    )
    flip: float = option(
        0.0, "Train on images mirrored left to right with this probability (0.5, unless captions tell left from right)."
    )
    features: str | None = option(
        None, "Folder of precompute_features.py: train on what is in it, without the vision encoder in memory."
    )
    max_caption_length: int = option(64, "Cut longer captions to so many tokens.")


def of_each(args: DataArguments, name: str, default: str | None = None) -> list:
    """What an option says of each data set: it may be given once for all."""
    values = getattr(args, name) or [default]
    if len(values) not in (1, len(args.dataset_name)):
        raise InputError(
            f"--{name} has {len(values)} values for {len(args.dataset_name)} data sets: give one of each, or of all."
        )
    return values if len(values) > 1 else values * len(args.dataset_name)


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
    check_crop(args.smallest_crop)
    check_flip(args.flip)
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
    variations: Variations,
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
            eval_split = next((split for split in EVAL_SPLITS if split in store.layouts), None)
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
        if args.streaming:
            sources.append(
                StreamSource(label, train_rows, image_column, caption_column, folder, args.max_train_samples)
            )
        else:
            features = store and store.split(args.train_split)
            columns = (image_column, caption_column, skipped, variations, features, args.image_id_column, folder)
            parts.append(CaptionDataset(train_rows, label, *columns))
        if number == 0:
            if args.eval_dataset_name is not None:
                eval_rows = load_held_out(
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
                columns = (image_column, caption_column, skipped, None, features, args.image_id_column, folder)
                prefix = "" if args.eval_dataset_name is None else "eval_"
                evaluation = CaptionDataset(eval_rows, split, *columns, option_prefix=prefix).readable()
    if args.streaming:
        stream = CaptionStream(
            sources, skipped, variations, args.dataset_weights, args.shuffle_buffer, process, processes
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
    eval_data.variations = Variations()
    train_data.indices, eval_data.indices = train_data.indices[:first], train_data.indices[first:][:max_eval_samples]
    return eval_data.readable()
