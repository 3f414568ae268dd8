"""Rows of text files, recognised by their content: tables, JSON rows, and JSON documents of captions.

Nothing here imports `datasets`, so that files of captions are scored without it.
"""

from collections.abc import Iterator
from typing import TextIO

from .caption_forms import VizWizRules, read_form
from .json_files import Document, read_json
from .skipped_rows import SkippedRows
from .text_files import Columns, open_text, read_table

TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".token", ".json", ".jsonl")


def is_json(text: TextIO) -> bool:
    """Return whether the first character of an opened text is a bracket of JSON, and go back to the beginning."""
    while (character := text.read(1)).isspace():
        pass
    text.seek(0)
    return character in ("[", "{")


def is_table(file: str) -> bool:
    """Return whether a file is a table of delimited text rather than JSON."""
    with open_text(file) as text:
        return not is_json(text)


def read_document(file: str) -> Document | None:
    """Return the JSON document that a file holds, or `None` for a file of rows."""
    with open_text(file) as text:
        content = read_json(text, file) if is_json(text) else None
        return content if isinstance(content, dict) else None


def read_batches(file: str) -> Iterator[Columns]:
    """Yield the rows of a file that does not hold a document, 10,000 at a time.

    Raises:
        InputError: for a file that is not valid. The message names the line.
    """
    with open_text(file) as text:
        content = read_json(text, file) if is_json(text) else read_table(text, file)
        assert not isinstance(content, dict)
        yield from content


def read_columns(file: str, rules: VizWizRules | None = None, skipped: SkippedRows | None = None) -> Columns:
    """Read all rows of a text file.

    Args:
        file: a table, JSON rows, or a JSON document in one of the forms of [`read_form`].
        rules: rules for the captions of VizWiz.
        skipped: record of the captions that these rules leave out.

    Raises:
        InputError: for a file that is not valid.

    Example:

    ```python
    >>> read_columns("photos/captions.csv")  # doctest: +SKIP
    {'image': ['dog.jpg', 'dog.jpg'], 'caption': ['A dog runs over the grass.', 'A brown dog outdoors.']}
    ```
    """
    if (document := read_document(file)) is not None:
        return read_form(document, file, rules or VizWizRules(), SkippedRows() if skipped is None else skipped)
    columns: Columns = {}
    rows = 0
    for batch in read_batches(file):
        size = len(next(iter(batch.values()), []))
        for name in {**columns, **batch}:
            columns.setdefault(name, [None] * rows).extend(batch.get(name, [None] * size))
        rows += size
    return columns
