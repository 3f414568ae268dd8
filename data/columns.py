"""Columns of a data set, including nested ones such as `json.caption`."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import datasets

from ..common.errors import InputError
from .names import IMAGE_NAMES, find_name

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def column_names(rows: Rows) -> list[str]:
    """Return the names of the columns. For a stream without a schema, return the keys of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def image_column_of(rows: Rows, asked: str) -> str:
    """Return the column that holds the images.

    Args:
        rows: the data set.
        asked: the column that was asked for. Where the usual one, "image", is missing, the only column with the same
            meaning takes its place. Otherwise it is the only one of images, such as `jpg` in tars, or `image_id`.
    """
    existing = column_names(rows)
    found = find_name(IMAGE_NAMES, existing, asked)
    if found is not None or asked != "image":
        return found or asked
    kinds = {name: getattr(kind, "feature", kind) for name, kind in (rows.features or {}).items()}  # also of lists
    of_images = [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]
    if len(of_images) == 1:
        return of_images[0]
    return "image_id" if "image_id" in existing else asked


def with_nested_columns(rows: datasets.Dataset, *columns: str) -> datasets.Dataset:
    """Return the rows with each nested column (`json.caption`) as a separate column.

    Args:
        rows: the data set.
        columns: names of columns. Names that are not nested or do not exist are ignored.
    """
    for column in columns:
        outer = column.split(".")[0]
        if column not in rows.column_names and outer in rows.column_names:
            nested = rows.select_columns(outer).flatten()
            if column in nested.column_names:
                rows = datasets.concatenate_datasets([rows, nested.select_columns(column)], axis=1)
    return rows


def nested_value(row: dict[str, Any], column: str) -> Any:
    """Return the value of a column in a row, or `None`; the column may be nested (`json.caption`)."""
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def with_label_names(rows: Rows) -> Rows:
    """Return the rows with the names of their classes instead of numbers, in each column of class labels.

    Args:
        rows: the data set. A number below 0 marks a row without a label, which becomes `None`.
    """
    labels = {name: kind for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
    if not labels:
        return rows
    if isinstance(rows, datasets.IterableDataset):
        features = datasets.Features({**rows.features, **dict.fromkeys(labels, datasets.Value("string"))})
        return rows.map(names_in_row, fn_kwargs={"labels": labels}, input_columns=list(labels), features=features)
    for name, kind in labels.items():
        values = [class_name(kind, number) for number in rows[name]]
        names = datasets.Dataset.from_dict({name: values}, features=datasets.Features({name: datasets.Value("string")}))
        rows = datasets.concatenate_datasets([rows.remove_columns(name), names], axis=1)
    return rows


def names_in_row(*numbers: int | None, labels: dict[str, datasets.ClassLabel]) -> dict[str, str | None]:
    """Return the names of the classes of a row."""
    return {name: class_name(kind, number) for (name, kind), number in zip(labels.items(), numbers, strict=True)}


def class_name(labels: datasets.ClassLabel, number: int | None) -> str | None:
    """Return the name of a class, or `None` if its number is missing or below 0."""
    return None if number is None or number < 0 else labels.int2str(number)


def missing_column(column: str, existing: Sequence[str], option: str) -> InputError:
    """Return the error for a column that a data set does not have.

    Args:
        column: the column that was asked for.
        existing: the columns of the data set.
        option: the command-line option that chooses the column, without dashes.
    """
    names = ", ".join(map(repr, existing))
    return InputError(f"The data set has no column {column!r}; its columns are {names}. Choose one with --{option}.")
