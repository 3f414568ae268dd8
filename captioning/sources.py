"""Where captioned rows come from: the Hub, a folder, or a brush."""

import os

import datasets

from . import InputError
from .scenes import load_scenes

EVAL_SPLITS = ("validation", "val", "dev", "test")  # the first there is


def load_rows(
    name: str, config_name: str | None = None, split_column: str = "split", split: str | None = None
) -> dict[str, datasets.Dataset]:
    """Load a data set, by split.

    Args:
        name: a data set on the Hub, or a local folder (images with a `metadata.jsonl` or `metadata.csv`, parquet, ...).
        config_name: which of a data set's configurations.
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        split: load (and download) this split alone.

    Raises:
        InputError: for a data set or split that is not there.
    """
    try:
        files = None
        if split is not None:  # or all splits would be downloaded
            files = datasets.load_dataset_builder(name, config_name).config.data_files
            files = {split: files[split]} if split in files else files
        rows = datasets.load_dataset(name, config_name, data_files=files)
    except Exception as error:  # the library raises a different class for each way of not finding it
        kind = "folder" if os.path.exists(name) else "data set"
        raise InputError(
            f"The {kind} {name!r} cannot be loaded: {str(error).splitlines()[0]} Give a data set id of the Hub, or a "
            "folder of images with a metadata.jsonl beside them."
        ) from error
    if len(rows) == 1 and split_column in (only := next(iter(rows.values()))).column_names:
        labels = only[split_column]
        if split is None or split in labels:
            rows = {label: only.select([i for i, own in enumerate(labels) if own == label]) for label in set(labels)}
    if split is not None and split not in rows:
        raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
    return rows


def load_splits(
    name: str,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    split_column: str = "split",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Load the rows to train on and the rows to evaluate on.

    Args:
        name: a data set on the Hub, a local folder (images with a `metadata.jsonl` or `metadata.csv`, parquet, ...), or
            "scenes" for pictures drawn on the spot.
        config_name: which of a data set's configurations.
        train_split, eval_split: names of splits. By default the evaluation split is the first there is of "validation",
            "val", "dev" and "test".
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        max_train_samples, max_eval_samples: keep so many rows, the first ones (of scenes: draw so many).
        seed: of the scenes.

    Raises:
        InputError: for a data set or split that is not there.
    """
    if name == "scenes":
        rows = load_scenes(max_train_samples or 10_000, max_eval_samples or 200, seed=seed)
        return rows["train"], rows["validation"]
    rows = load_rows(name, config_name, split_column)
    if eval_split is None:
        eval_split = next((split for split in EVAL_SPLITS if split in rows), None)
    for split in (train_split, eval_split):
        if split is not None and split not in rows:
            raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")

    def first(split: str, number: int | None) -> datasets.Dataset:
        return rows[split].select(range(min(number or len(rows[split]), len(rows[split]))))

    return first(train_split, max_train_samples), eval_split and first(eval_split, max_eval_samples)
