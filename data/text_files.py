"""Text files of rows: their encoding, and tables of delimited text."""

import codecs
import csv
import io
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import fsspec

from ..common.errors import InputError, one_line
from .names import CAPTION_NAMES, IMAGE_NAMES, is_image_reference, normal

Columns = dict[str, list]  # the values of each column, all of the same length

ROWS_PER_BATCH = 10_000
MAX_COLUMNS = 1000
MAX_FIELD_CHARACTERS = 2**27  # an image in base64 is a long field
DELIMITERS = "\t|;,"  # the rarer a character is in captions, the earlier
BYTE_ORDER_MARKS = {  # that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


# ----------------------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------------------


@contextmanager
def open_text(file: str) -> Iterator[TextIO]:
    """Open a text file or URL, with the ends of its lines as they are.

    UTF-8 and UTF-16 are recognised, with and without a byte-order mark. Other encodings cannot be told apart with
    certainty, so they are refused.

    Raises:
        InputError: in the `with` block, if the text is not in one of these encodings.
    """
    with fsspec.open(file, "rb") as opened:
        head = opened.read(2**12)
        opened.seek(0)
        try:
            yield io.TextIOWrapper(opened, text_encoding(head), newline="")
        except UnicodeError as error:
            raise not_unicode(file, error) from error


def text_encoding(head: bytes) -> str:
    """Return the Unicode encoding of a text that begins with these bytes."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return encoding
    # Most characters of a table are ASCII, of which UTF-16 makes every other byte zero.
    zeros = head[::2].count(0), head[1::2].count(0)
    if max(zeros) > len(head) // 8 and min(zeros) == 0:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return "utf-8"


def not_unicode(file: str, error: UnicodeError) -> InputError:
    """Return the error for a text in another encoding, with its first line that is not UTF-8."""
    place = ""
    with fsspec.open(file, "rb") as opened:
        for number, line in enumerate(opened, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                place = f" (byte 0x{found.object[found.start]:02x} in line {number})"
                break
    return InputError(f"{file[:200]!r} is not UTF-8 text{place}: save it as UTF-8, not compressed.")


# ----------------------------------------------------------------------------------------------------------------------
# Tables
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableLayout:
    """Layout of a table of delimited text, found in its first line.

    Args:
        delimiter: character between the fields of a line.
        columns: names of the columns.
        has_header: whether the first line holds the names of the columns instead of a row.
    """

    delimiter: str
    columns: list[str]
    has_header: bool

    @property
    def has_quotes(self) -> bool:
        """Return whether a quote at the beginning of a field quotes it, instead of being a character of the text."""
        return self.delimiter in ",;"

    @classmethod
    def of(cls, line: str, name: str, delimiter: str | None = None) -> "TableLayout":
        """Find the layout of a table.

        Args:
            line: the first line.
            name: the file, for messages.
            delimiter: the delimiter, if the file states it.

        Raises:
            InputError: if there are too many columns, or the line holds a row whose columns have no known meaning.
        """
        delimiter = delimiter or find_delimiter(line)
        fields = split_line(line, delimiter)
        if len(fields) > MAX_COLUMNS:
            raise InputError(f"The file {name!r} has more than {MAX_COLUMNS} columns.")
        if not any(map(is_image_reference, fields)):
            return cls(delimiter, unique_names(fields), has_header=True)
        images = [number for number, field in enumerate(fields) if is_image_reference(field)]
        others = [number for number in range(len(fields)) if number not in images]
        texts = others if len(others) == 1 else [n for n in others if not fields[n].strip().isdecimal()]
        if len(images) != 1 or len(texts) != 1:
            raise InputError(
                f"The first line of {name!r} holds a row instead of names of columns: add a first line such as "
                "image,caption."
            )
        columns = [{images[0]: "image", texts[0]: "caption"}.get(n, f"column {n + 1}") for n in range(len(fields))]
        return cls(delimiter, columns, has_header=False)


def find_delimiter(line: str) -> str:
    """Return the delimiter of a line: the one that makes a field a known name or an image, otherwise the most frequent.

    Example:

    ```python
    >>> find_delimiter("image;caption"), find_delimiter("a.jpg#0\\tA dog, a cat; grass")
    (';', '\\t')
    ```
    """
    for delimiter in DELIMITERS:
        fields = split_line(line, delimiter)
        if len(fields) > 1 and any(normal(f) in IMAGE_NAMES + CAPTION_NAMES or is_image_reference(f) for f in fields):
            return delimiter
    return max(DELIMITERS[::-1], key=line.count)


def split_line(line: str, delimiter: str) -> list[str]:
    """Return the fields of the first line of a table, without quotes around them."""
    (fields,) = csv.reader([line.rstrip("\r\n")], delimiter=delimiter, skipinitialspace=True) or [[]]
    return fields


def unique_names(names: list[str]) -> list[str]:
    """Return a different name for each column: blank names are numbered, and repeated ones get a number.

    Example:

    ```python
    >>> unique_names(["image", "text", "text", ""])
    ['image', 'text', 'text 2', 'column 4']
    ```
    """
    unique: dict[str, None] = {}
    for number, name in enumerate(names, start=1):
        name = wanted = name.strip() or f"column {number}"
        copy = 1
        while name in unique:
            copy += 1
            name = f"{wanted} {copy}"
        unique[name] = None
    return list(unique)


def read_table(text: TextIO, name: str) -> Iterator[Columns]:
    """Read a table of delimited text, in which every cell is text as written.

    The delimiter is recognised: a comma, semicolon, tab or vertical bar. In a table with commas or semicolons, quotes
    quote a field. A line with too few fields is filled with `None`. Blank lines are left out.

    Args:
        text: the table, opened with `newline=""`.
        name: the file, for messages.

    Yields:
        The values of each column, 10,000 rows at a time.

    Raises:
        InputError: for an empty table, a line with too many fields, or quotes that do not match. The message names the
            line.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    number, first, delimiter = 0, "", None
    for first in text:
        number += 1
        if declared := re.fullmatch(r'"?sep=(.)"?\s*', first):  # written by spreadsheets
            delimiter = declared[1]
        elif first.strip():
            break
    if not first.strip():
        raise InputError(f"The file {name!r} is empty.")
    layout = TableLayout.of(first, name, delimiter)
    lines = text if layout.has_header else itertools.chain([first], text)
    rows = TableRows(layout, lines, name, number if layout.has_header else number - 1)
    is_empty = True
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        is_empty = False
        yield dict(zip(layout.columns, map(list, zip(*batch, strict=True)), strict=True))
    if is_empty:
        raise InputError(f"The file {name!r} has no rows.")


class TableRows(Iterator[list[str | None]]):
    """Rows of a table, each with as many fields as the table has columns.

    Args:
        layout: the layout of the table.
        lines: the lines after the header.
        name: the file, for messages.
        skipped_lines: number of lines in front of `lines`.

    Raises:
        InputError: while iterating, for a line that does not fit the layout.
    """

    def __init__(self, layout: TableLayout, lines: Iterator[str], name: str, skipped_lines: int):
        self.layout = layout
        self.name = name
        self.skipped_lines = skipped_lines
        self.reader = csv.reader(
            lines,
            delimiter=layout.delimiter,
            quoting=csv.QUOTE_MINIMAL if layout.has_quotes else csv.QUOTE_NONE,
            strict=True,
            skipinitialspace=layout.has_quotes,
        )

    def __next__(self) -> list[str | None]:
        line = self.skipped_lines + self.reader.line_num + 1
        try:
            row = next(self.reader)
            while not any(row) or not any(map(str.strip, row)):
                row = next(self.reader)
        except csv.Error as error:
            raise InputError(
                f"The row in line {line} of {self.name!r} is not valid CSV ({one_line(error, 100)}): a field that "
                "begins with a quote must end with one, and quotes inside are doubled."
            ) from error
        if self.layout.delimiter == "|":
            row = list(map(str.strip, row))
        if not self.layout.has_header:  # Flickr8k.token.txt numbers the captions of an image: a.jpg#0, a.jpg#1
            image = self.layout.columns.index("image")
            row[image : image + 1] = [re.sub(r"#\d+\s*$", "", cell) for cell in row[image : image + 1]]
        if not self.layout.has_quotes and any('""' in cell for cell in row):
            row = list(map(unquoted, row))
        return [*row] if len(row) == len(self.layout.columns) else self.fit(row)

    def fit(self, row: list[str]) -> list[str | None]:
        """Return a row of another length with as many fields as the table has columns."""
        width = len(self.layout.columns)
        if len(row) > width:
            if any(map(str.strip, row[width:])):
                raise InputError(
                    f"Line {self.skipped_lines + self.reader.line_num} of {self.name!r} has {len(row)} fields, but the "
                    f"table has {width} columns: put quotes around text that contains {self.layout.delimiter!r}, and "
                    "name all columns in the first line."
                )
            return [*row[:width]]
        # One row of Flickr30k's results.csv has no delimiter between the number of the comment and the comment.
        merged = re.fullmatch(r"\s*(\d+)\s+(\S.*)", row[-1])
        if merged and len(row) == width - 1 and normal(self.layout.columns[-2]) == "comment_number":
            return [*row[:-1], *merged.groups()]
        return [*row, *[None] * (width - len(row))]


def unquoted(cell: str) -> str:
    """Return a cell without the quotes that a writer of CSV put around it because of quotes inside."""
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*""(?:[^"]|"")*"', cell) else cell
