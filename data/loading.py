"""Loading a data set by name: from the Hub, a folder, or files of rows."""

import functools
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from ..common.errors import InputError
from .columns import Rows, column_names
from .row_files import check_table, dataset_loading_error, find_files, read_files, reason_of

PEEK_ROWS = 10_000  # rows of a stream that are read to find its splits


def load_rows(
    name: str,
    config_name: str | None = None,
    split_column: str = "split",
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> dict[str, Rows]:
    """Load the splits of a data set.

    Args:
        name: one of

            - a data set on the Hub;
            - a local folder: images with a `metadata.jsonl` or `metadata.csv`, or parquet files;
            - a file of rows (`.parquet`, `.json`, `.jsonl`, `.csv`, `.tsv`), of webdataset samples (`.tar`), or of
              COCO's annotations;
            - several such files: `shards/*.tar` or `train-{000..015}.tar`.
        config_name: name of one of the data set's configurations.
        split_column: column with the name of each row's split, for data sets that keep all rows in one split.
        split: load and download this split only.
        revision: branch, tag or commit of a data set on the Hub.
        streaming: return streams, which read rows on demand and do not store them. Their images are undecoded.

    Returns:
        The rows of each split.

    Raises:
        InputError: if the data set or the split does not exist, or a file cannot be read.

    Example:

    ```python
    >>> rows = load_rows("shards/train-{000..015}.tar", streaming=True)  # doctest: +SKIP
    >>> row = next(iter(rows["train"]))  # doctest: +SKIP
    ```
    """
    files = find_files(name)
    try:
        for file in files or Path(name).rglob("*.json*"):
            check_table(file)
        if files:
            splits = read_files(files, streaming)
        else:
            splits = load_from_hub_or_folder(name, config_name, split, revision, streaming)
        if streaming:
            next(iter(undecoded(next(iter(splits.values())))))  # raise an error now if the first row cannot be read
    except Exception as error:  # `datasets` raises a different class for each way of failing
        raise dataset_loading_error(name, files, error) from error
    if len(splits) == 1 and split_column in column_names(rows := next(iter(splits.values()))):
        by_label = split_by_column(rows, split_column)
        splits = by_label if split is None or split in by_label else splits
    if split is not None and split not in splits:
        raise missing_split(name, split, splits)
    return {label: undecoded(rows) if streaming else rows for label, rows in splits.items()}


def load_from_hub_or_folder(
    name: str, config_name: str | None, split: str | None, revision: str | None, streaming: bool
) -> dict[str, Rows]:
    """Load a data set on the Hub, or a local folder, with `datasets`."""
    path = os.path.abspath(name) if os.path.isdir(name) else name  # `datasets` does not accept "."
    data_files = None
    if split is not None:  # otherwise files of all splits would be downloaded
        data_files = datasets.load_dataset_builder(path, config_name, revision=revision).config.data_files
        data_files = {split: data_files[split]} if split in data_files else data_files
    return datasets.load_dataset(path, config_name, data_files=data_files, revision=revision, streaming=streaming)


def split_by_column(rows: Rows, column: str) -> dict[str, Rows]:
    """Return the rows of each split, named by a column. For a stream, the splits are those of its first rows."""
    if isinstance(rows, datasets.Dataset):
        labels = rows[column]
        return {
            label: rows.select([index for index, other in enumerate(labels) if other == label])
            for label in dict.fromkeys(labels)
        }
    rows = undecoded(rows)
    labels = dict.fromkeys(row[column] for row in rows.select_columns(column).take(PEEK_ROWS))
    return {label: rows.filter(functools.partial(operator.eq, label), input_columns=column) for label in labels}


def missing_split(name: str, split: str, existing: Any) -> InputError:
    """Return the error for a split that a data set does not have.

    Args:
        name: name of the data set.
        split: the split that was asked for.
        existing: names of the splits that the data set has.
    """
    return InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, existing))}.")


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
    except Exception as error:  # each file reader raises its own errors
        raise InputError(f"{name} cannot be read: {reason_of(error).rstrip('.')}.") from error
