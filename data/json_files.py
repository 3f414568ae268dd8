"""JSON files: one document, a list of rows, or a row on each line."""

import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from ..common.errors import InputError, one_line
from .text_files import ROWS_PER_BATCH, Columns

Document = dict[str, Any]

NUMBERS = {"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}  # as Python writes them


def read_json(text: TextIO, name: str) -> Document | Iterator[Columns]:
    """Read a JSON file.

    Args:
        text: the file. It must stay open until the rows are read.
        name: the file, for messages.

    Returns:
        A document if the whole file is one object, otherwise batches of rows.

    Raises:
        InputError: for JSON that is not valid. The message names the line. Rows raise it while they are read.
    """
    first = next((line for line in text if line.strip()), "")
    if not first:
        raise InputError(f"The file {name!r} is empty.")
    if first.lstrip().startswith("{"):
        try:
            row = decode(first)
        except (ValueError, RecursionError):  # the first line of a document of several lines, or not valid
            pass
        else:
            second = next((line for line in text if line.strip()), None)
            if second is None:
                return batches([row], name) if name.lower().endswith(".jsonl") else row
            return batches(parse_lines(itertools.chain([first, second], text), name), name)
    if first.lstrip().startswith("["):
        return batches(items_of_list(first, text, name), name)
    document = parse(first + text.read(), name)
    assert isinstance(document, dict)
    return document


def items_of_list(first: str, text: TextIO, name: str) -> Iterator[Any]:
    """Yield the items of a list whose first line has been read."""
    yield from parse(first + text.read(), name)


def parse(content: str, name: str) -> list | Document:
    """Return the list or object that a text holds."""
    try:
        value = decode(content)
    except json.JSONDecodeError as error:
        raise InputError(
            f"The file {name!r} cannot be read: line {error.lineno} is not valid JSON ({error.msg} in column "
            f"{error.colno}); it may have been cut off."
        ) from error
    except (ValueError, RecursionError) as error:  # a repeated name, thousands of digits, or thousands of brackets
        raise InputError(f"The file {name!r} cannot be read: {one_line(error, 200)}.") from error
    if not isinstance(value, list | dict):
        raise InputError(f"The file {name!r} does not hold rows: it holds a JSON value of type {type(value).__name__}.")
    return value


def decode(text: str) -> Any:
    """Return the value of a JSON text, in which NaN is an empty cell.

    Raises:
        ValueError: if the text is not valid, or an object has two values of the same name.

    Example:

    ```python
    >>> decode('{"image": "a.jpg", "caption": NaN}')
    {'image': 'a.jpg', 'caption': None}
    ```
    """
    return json.loads(text, object_pairs_hook=object_of, parse_constant=lambda name: NUMBERS[name])


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these pairs.

    Raises:
        ValueError: if a value would be lost because another has the same name.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        lost = next((name for name, own in pairs if own != value[name]), None)
        if lost is not None:
            raise ValueError(f"an object has several values named {lost[:100]!r}: give them as one list")
    return value


def parse_lines(lines: Iterable[str], name: str) -> Iterator[Any]:
    """Yield the JSON value of each line, without blank lines."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield decode(line)
        except (ValueError, RecursionError) as error:
            reason = one_line(getattr(error, "msg", error), 200)
            raise InputError(
                f"The file {name!r} cannot be read: line {number} is not valid JSON ({reason}); it may have been cut "
                "off."
            ) from error


def batches(rows: Iterable[Any], name: str) -> Iterator[Columns]:
    """Yield the columns of 10,000 rows at a time. A column that a row lacks is `None` there.

    Raises:
        InputError: if a row is not an object, or there are no rows.
    """
    rows = iter(rows)
    number = 0
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield columns_of(batch, name, number)
        number += len(batch)
    if not number:
        raise InputError(f"The file {name!r} has no rows.")


def columns_of(rows: list, name: str, rows_before: int = 0) -> Columns:
    """Return the columns of rows.

    Args:
        rows: the rows.
        name: the file, for messages.
        rows_before: number of rows of the file in front of these.

    Raises:
        InputError: if a row is not an object.
    """
    for number, row in enumerate(rows, start=rows_before + 1):
        if not isinstance(row, dict):
            raise InputError(
                f"Row {number} of {name!r} is of type {type(row).__name__}, not an object such as "
                '{"image": "a.jpg", "caption": "a dog"}.'
            )
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(itertools.chain(*rows))}
