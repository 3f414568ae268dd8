"""Where captioned rows come from: the Hub, a folder, files, or a brush."""

import functools
import operator
import os
from collections.abc import Iterator
from pathlib import Path

import datasets

from ..common.errors import InputError
from .readers import Rows, check_text, find_files, read_files, reason_of, why_not_loaded

PEEK = 10_000  # rows of a stream that are looked at where all of them would take too long


def load_rows(
    name: str,
    config_name: str | None = None,
    split_column: str = "split",
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> dict[str, Rows]:
    """Load a data set, by split.

    Args:
        name: a data set on the Hub; a local folder (images with a `metadata.jsonl` or `metadata.csv`, parquet, ...); a
            file of rows (`.parquet`, `.json`, `.jsonl`, `.csv`, `.tsv`), of webdataset samples (`.tar`), or of COCO's
            annotations; or several files, as in `shards/*.tar` or `train-{000..015}.tar`.
        config_name: which of a data set's configurations.
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        split: load (and download) this split alone.
        revision: which branch, tag or commit of a data set on the Hub.
        streaming: read rows when they are asked for, and keep none.

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.

    Example:

    ```python
    >>> rows = load_rows("shards/train-{000..015}.tar", streaming=True)  # doctest: +SKIP
    >>> row = next(iter(rows["train"]))  # doctest: +SKIP
    ```
    """
    files = find_files(name)
    try:
        for file in files or Path(name).rglob("*.json*"):
            check_text(file)
        if files:
            rows = read_files(files, streaming)
        else:
            place = os.path.abspath(name) if os.path.isdir(name) else name  # "." is no name to the library
            data_files = None
            if split is not None:  # or all splits would be downloaded
                data_files = datasets.load_dataset_builder(place, config_name, revision=revision).config.data_files
                data_files = {split: data_files[split]} if split in data_files else data_files
            rows = datasets.load_dataset(
                place, config_name, data_files=data_files, revision=revision, streaming=streaming
            )
        if streaming:
            next(iter(undecoded(next(iter(rows.values())))))  # what cannot be read should fail now
    except Exception as error:  # the library raises a different class for each way of not finding it
        raise InputError(why_not_loaded(name, files, error)) from error
    if len(rows) == 1 and split_column in columns_of(only := next(iter(rows.values()))):
        parts = split_by(only, split_column)
        rows = parts if split is None or split in parts else rows
    if split is not None and split not in rows:
        raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
    return {label: undecoded(part) if streaming else part for label, part in rows.items()}


def columns_of(rows: Rows) -> list[str]:
    """The names of the columns; of a stream that does not say, those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def with_nested(rows: datasets.Dataset, *columns: str) -> datasets.Dataset:
    """The rows, and those of the columns that lie inside others (`json.caption`) as columns of their own."""
    for column in columns:
        outer = column.split(".")[0]
        if column not in rows.column_names and outer in rows.column_names:
            nested = rows.select_columns(outer).flatten()
            if column in nested.column_names:
                rows = datasets.concatenate_datasets([rows, nested.select_columns(column)], axis=1)
    return rows


def split_by(rows: Rows, column: str) -> dict[str, Rows]:
    """The rows of each label in a column; of a stream, of each label in its first rows."""
    if isinstance(rows, datasets.Dataset):
        labels = rows[column]
        return {
            label: rows.select([i for i, own in enumerate(labels) if own == label]) for label in dict.fromkeys(labels)
        }
    rows = undecoded(rows)
    labels = dict.fromkeys(row[column] for row in rows.select_columns(column).take(PEEK))
    return {label: rows.filter(functools.partial(operator.eq, label), input_columns=column) for label in labels}


def undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Images of a stream as bytes or paths: a damaged one must fail where it is opened, not inside the library."""
    return rows.decode(False) if rows.features else rows


def rows_of(rows: datasets.IterableDataset, name: str) -> Iterator[dict]:
    """The rows of a stream, all of them: `for row in rows` would share them out among data-loading processes.

    Raises:
        InputError: if a file cannot be read; the message begins with `name`.
    """
    try:
        for batch in rows.iter(batch_size=1):
            yield {column: values[0] for column, values in batch.items()}
    except Exception as error:  # each reader of files has errors of its own
        raise InputError(f"{name} cannot be read: {reason_of(error).rstrip('.')}.") from error
