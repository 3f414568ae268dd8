"""Loading a data set by name: from the Hub, a folder, or files of rows."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ..common.errors import InputError, one_line
from ..common.logging import get_logger
from .caption_forms import VizWizRules
from .columns import Rows, column_names, with_label_names
from .folders import read_folder
from .names import find_name
from .row_files import check_table, dataset_loading_error, find_files, read_files, reason_of
from .skipped_rows import SkippedRows

logger = get_logger(__name__)

PEEK_ROWS = 10_000  # rows of a stream that are read to find its splits


def load_rows(
    name: str,
    config_name: str | None = None,
    split_column: str = "split",
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    skipped: SkippedRows | None = None,
    rules: VizWizRules | None = None,
) -> dict[str, Rows]:
    """Load the splits of a data set.

    Args:
        name: one of

            - a data set on the Hub;
            - a local folder: images with captions, as [`read_folder`] finds them, or parquet files;
            - a file of rows or its URL: `.parquet`, `.json`, `.jsonl`, `.csv`, `.tsv`, `.txt` or `.token`;
            - a file of COCO's annotations or in another form of [`read_form`], or of webdataset samples (`.tar`);
            - several such files: `shards/*.tar` or `train-{000..015}.tar`.
        config_name: name of one of the data set's configurations.
        split_column: column with the name of each row's split, for data sets that keep all rows in one split.
        split: load and download this split only.
        revision: branch, tag or commit of a data set on the Hub.
        skipped: record of the rows that belong to no split, and of what a folder holds besides its rows.
        streaming: return streams, which read rows on demand and do not store them. Their images are undecoded.
        rules: rules for the captions of VizWiz.

    Returns:
        The rows of each split. Columns of class labels hold the names of the classes.

    Raises:
        InputError: if the data set or the split does not exist, or a file cannot be read.

    Example:

    ```python
    >>> rows = load_rows("shards/train-{000..015}.tar", streaming=True)  # doctest: +SKIP
    >>> row = next(iter(rows["train"]))  # doctest: +SKIP
    ```
    """
    files = find_files(name)
    skipped = SkippedRows() if skipped is None else skipped
    splits: dict[str, Rows] | None = None
    try:
        if files:
            for file in files:
                check_table(file)
            splits = read_files(files, streaming, rules, skipped)
        elif os.path.isdir(name) and config_name is None:
            splits = read_folder(name, streaming, skipped, rules)
        if splits is None:
            splits = load_from_hub_or_folder(name, config_name, split, revision, streaming)
        splits = {label: with_label_names(rows) for label, rows in splits.items()}
        if streaming:
            next(iter(undecoded(next(iter(splits.values())))))  # raise an error now if the first row cannot be read
    except Exception as error:  # `datasets` raises a different class for each way of failing
        raise dataset_loading_error(name, files, error) from error
    if len(splits) == 1:
        existing = column_names(rows := next(iter(splits.values())))
        column = find_name(("split",), existing, split_column)
        if column is not None:
            by_label = split_by_column(rows, column, skipped) or splits
            splits = by_label if split is None or split in by_label else splits
        elif split is None and split_column != "split":
            logger.warning("%s has no column %r (--split_column): its rows are not split.", name, split_column)
    if split is not None and split not in splits:
        raise missing_split(name, split, splits, "--split")
    return {label: undecoded(rows) if streaming else rows for label, rows in splits.items()}


def load_from_hub_or_folder(
    name: str, config_name: str | None, split: str | None, revision: str | None, streaming: bool
) -> dict[str, Rows]:
    """Load a data set on the Hub, or a local folder (also one of `save_to_disk`), with `datasets`."""
    for file in Path(name).rglob("*.json*"):
        check_table(file)
    path = os.path.abspath(name) if os.path.isdir(name) else name  # `datasets` does not accept "."
    if any(os.path.isfile(os.path.join(path, file)) for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(path)
        parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {label: rows.to_iterable_dataset() if streaming else rows for label, rows in parts.items()}
    data_files = None
    if split is not None:  # otherwise files of all splits would be downloaded
        data_files = datasets.load_dataset_builder(path, config_name, revision=revision).config.data_files
        data_files = {split: data_files[split]} if split in data_files else data_files
    return datasets.load_dataset(path, config_name, data_files=data_files, revision=revision, streaming=streaming)


def split_by_column(rows: Rows, column: str, skipped: SkippedRows) -> dict[str, Rows]:
    """Return the rows of each split, named by a column. For a stream, the splits are those of its first rows.

    Args:
        rows: all rows.
        column: the column.
        skipped: record of the rows whose cell is empty. They belong to no split.

    Returns:
        The rows of each split. The result is empty if all cells are empty.
    """
    if isinstance(rows, datasets.Dataset):
        labels = list(rows[column])
    else:
        rows = undecoded(rows)
        labels = [row[column] for row in rows.select_columns(column).take(PEEK_ROWS)]
    numbers: dict[str, list[int]] = {}
    without = []
    for number, label in enumerate(labels):
        if label is None or not str(label).strip():
            without.append(number)
        else:
            numbers.setdefault(str(label).strip(), []).append(number)
    if numbers and without:
        for number in without:
            skipped.add("none", number, None, f"The row has no split: its column {column!r} is empty.")
        logger.warning("%d rows have no split in the column %r and are left out.", len(without), column)
    if isinstance(rows, datasets.Dataset):
        return {label: rows.select(own) for label, own in numbers.items()}
    return {label: rows.filter(functools.partial(has_label, label), input_columns=column) for label in numbers}


def has_label(label: str, value: object) -> bool:
    """Return whether a cell holds the name of a split."""
    return str(value).strip() == label


def missing_split(name: str, split: str, existing: Any, options: str) -> InputError:
    """Return the error for a split that a data set does not have.

    Args:
        name: name of the data set.
        split: the split that was asked for.
        existing: names of the splits that the data set has.
        options: the command-line options that choose a split.
    """
    names = one_line(", ".join(map(repr, existing)), 200)
    return InputError(f"The data set {name[-100:]!r} has no split {split!r}; it has {names}. Choose with {options}.")


def undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Return a stream with undecoded images, so that a damaged image raises an error only when it is opened."""
    return rows.decode(False) if rows.features else rows


def iterate_rows(rows: datasets.IterableDataset, name: str) -> Iterator[dict[str, Any]]:
    """Yield all rows of a stream.

    Iterating over the stream directly would split the rows among the workers of a data loader.

    Args:
        rows: the stream.
        name: name of the data set, for the error message.

    Raises:
        InputError: if a file cannot be read.
    """
    try:
        for batch in rows.iter(batch_size=1):
            yield {column: values[0] for column, values in batch.items()}
    except InputError:
        raise
    except Exception as error:  # each file reader raises its own errors
        raise InputError(f"{name} cannot be read: {reason_of(error).rstrip('.')}.") from error
