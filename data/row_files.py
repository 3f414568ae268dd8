"""Files of rows (text, parquet, tar): finding, checking and reading them, and clear errors."""

import glob
import os
import re
from pathlib import Path
from typing import IO

import datasets
import pyarrow as pa

from ..common.errors import InputError, one_line
from .caption_forms import VizWizRules, read_form
from .columns import Rows
from .row_builder import RowFiles, arrow_table
from .skipped_rows import SkippedRows
from .tars import TarSamples
from .text_files import MAX_COLUMNS
from .text_rows import TEXT_SUFFIXES, read_document

TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
SUFFIXES = (*TABLE_SUFFIXES, ".tar")
MAX_NESTING = 1000  # of brackets in JSON
MAX_REASON_CHARACTERS = 300  # of an error of a reader, within a message


def find_files(name: str) -> list[str]:
    """Return the files that a name or pattern matches, in order.

    Args:
        name: a file, a URL, a pattern with wildcards (`shards/*.tar`), or numbers in braces (`train-{000..015}.tar`).

    Returns:
        The files. The list is empty for a folder or a data set on the Hub.

    Raises:
        InputError: if a file does not exist.
    """
    if os.path.isdir(name):
        return []
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        first, last = numbers.groups()
        before, after = name[: numbers.start()], name[numbers.end() :]
        names = [f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1)]
        return [file for numbered in names for file in find_files(numbered)]
    if os.path.isfile(name) or "://" in name:
        return [name]
    files = sorted(glob.glob(name, recursive=True))
    if not files and (glob.has_magic(name) or Path(name).suffix.lower() in SUFFIXES):
        raise InputError(f"There is no file {name!r}.")
    return files


def read_files(
    files: list[str], streaming: bool, rules: VizWizRules | None = None, skipped: SkippedRows | None = None
) -> dict[str, Rows]:
    """Read files of one kind. This is the border at which every form of file becomes rows with columns.

    Args:
        files: the files.
        streaming: return a stream. A JSON document is read at once nevertheless.
        rules: rules for the captions of VizWiz.
        skipped: record of the captions that these rules leave out.

    Returns:
        Their rows, as the split "train".

    Raises:
        InputError: if the files are of different kinds, or of a kind that cannot be read.
    """
    suffixes = {Path(file).suffix.lower() for file in files}
    if len(suffixes) > 1 or suffixes - set(SUFFIXES):
        raise InputError(
            f"Files of rows must all have the same suffix, one of {', '.join(SUFFIXES)}; these have "
            f"{', '.join(suffix or 'none' for suffix in sorted(suffixes))}."
        )
    escaped = {"train": list(map(glob.escape, files))}  # `datasets` interprets file names as patterns
    if (suffix := suffixes.pop()) == ".parquet":
        return dict(datasets.load_dataset("parquet", data_files=escaped, streaming=streaming))
    if suffix == ".tar":
        return build(TarSamples(data_files=escaped), streaming)
    documents = list(map(read_document, files))
    if documents[0] is not None:
        rules, skipped = rules or VizWizRules(), SkippedRows() if skipped is None else skipped
        parts = []
        for file, document in zip(files, documents, strict=True):
            if document is None:
                raise InputError(
                    f"{files[0]!r} holds one JSON document, but {file!r} holds rows: read them separately."
                )
            parts.append(arrow_table(read_form(document, file, rules, skipped)))
        rows = datasets.Dataset(pa.concat_tables(parts, promote_options="permissive"))
        return {"train": rows.to_iterable_dataset() if streaming else rows}
    return build(RowFiles(data_files=escaped), streaming)


def build(builder: datasets.DatasetBuilder, streaming: bool) -> dict[str, Rows]:
    """Return the rows that a builder reads, as the split "train"."""
    if streaming:
        return {"train": builder.as_streaming_dataset(split="train")}
    builder.download_and_prepare()
    return {"train": builder.as_dataset(split="train")}


def check_table(file: str | os.PathLike) -> None:
    """Refuse a file that would take hours to read or exhaust the stack.

    Args:
        file: a file of rows. Only local JSON and CSV files are checked.

    Raises:
        InputError: for a table of thousands of columns, or JSON with thousands of nested brackets.
    """
    kind = Path(file).suffix
    if kind not in (".json", ".jsonl", ".csv", ".tsv") or not os.path.isfile(file):
        return
    with open(file, "rb") as opened:
        if kind in (".csv", ".tsv"):
            if not has_few_columns(opened):
                raise InputError(f"The file {str(file)!r} has more than {MAX_COLUMNS} columns.")
        elif not has_shallow_nesting(opened):
            raise InputError(f"In the file {str(file)!r}, brackets are nested more than {MAX_NESTING} deep.")


def has_few_columns(file: IO[bytes]) -> bool:
    """Return whether the header and the first row, which may be longer, have at most `MAX_COLUMNS` columns."""
    lines = file.readline(2**20), file.readline(2**20)
    return max(line.count(separator) for line in lines for separator in (b",", b"\t")) <= MAX_COLUMNS


def has_shallow_nesting(file: IO[bytes]) -> bool:
    """Return whether brackets are nested at most `MAX_NESTING` deep."""
    depth = 0
    while block := file.read(2**14):
        opening = block.count(b"[") + block.count(b"{")
        if depth + opening > MAX_NESTING:  # estimate that ignores strings and closing brackets of the block
            break
        depth += opening - block.count(b"]") - block.count(b"}")
    else:
        return True
    # The quick count was not conclusive: count again, without strings.
    file.seek(0)
    depth = 0
    for token in re.finditer(rb'"(?:[^"\\]+|\\.)*+"|[\[{]|[\]}]', file.read(), re.DOTALL):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > MAX_NESTING:
            return False
    return True


def dataset_loading_error(name: str, files: list[str], error: Exception) -> InputError:
    """Return the error for a data set that could not be loaded.

    Args:
        name: name of the data set.
        files: the files that the name matches, if any.
        error: the error that `datasets` raised.
    """
    for raised in (error, error.__cause__):  # `datasets` wraps the errors of a builder
        if isinstance(raised, InputError):
            return raised
    reason = reason_of(error)
    if files:
        return InputError(f"The file {name!r} cannot be read: {reason.rstrip('.')}.")
    kind = "folder" if os.path.exists(name) else "data set"
    return InputError(
        f"The {kind} {name[-100:]!r} cannot be loaded ({reason[:200].rstrip('.')}): give the id of a data set on the "
        "Hub, a folder of images with a metadata.jsonl, or a file of rows."
    )


def reason_of(error: Exception) -> str:
    """Return why a reader failed, as one line.

    Args:
        error: the error that `datasets` raised. Its cause is the error of the file reader.
    """
    cause = error.__cause__ or error
    first_line = (str(cause).splitlines() or [""])[0]
    reason = one_line(first_line, MAX_REASON_CHARACTERS)
    if isinstance(cause, StopIteration) or "corresponds to no data" in reason:
        return "it has no rows"
    return f"{reason} is missing" if isinstance(cause, KeyError) else reason
