"""Files of rows (parquet, JSON, CSV, tar): finding, checking and reading them, and clear errors."""

import glob
import json
import os
import re
from pathlib import Path
from typing import IO, Any

import datasets

from ..common.errors import InputError, one_line
from .coco_annotations import read_coco_annotations
from .columns import Rows

# The builder of `datasets` that reads each kind of file, and its options. Cells of CSV files are read as text, because
# "NA" may be a caption.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".tar": ("webdataset", {}),
}
MAX_COLUMNS = 1000
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
    if not files and (glob.has_magic(name) or Path(name).suffix in READERS):
        raise InputError(f"There is no file {name!r}.")
    return files


def read_files(files: list[str], streaming: bool) -> dict[str, Rows]:
    """Read files of one kind.

    Returns:
        Their rows, as the split "train".

    Raises:
        InputError: if the files are of different kinds, or of a kind that cannot be read.
    """
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1 or kinds - set(READERS):
        raise InputError(
            f"Files of rows must all have the same suffix, one of {', '.join(READERS)}; these have "
            f"{', '.join(kind or 'none' for kind in sorted(kinds))}."
        )
    if kinds == {".json"} and len(files) == 1 and (rows := read_coco_annotations(files[0])) is not None:
        return {"train": rows.to_iterable_dataset() if streaming else rows}
    builder, options = READERS[kinds.pop()]
    escaped = list(map(glob.escape, files))  # `datasets` interprets file names as patterns
    return dict(datasets.load_dataset(builder, data_files={"train": escaped}, streaming=streaming, **options))


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
    """Return the error for a data set that could not be loaded, with the invalid line of a JSON file.

    Args:
        name: name of the data set.
        files: the files that the name matches, if any.
        error: the error that `datasets` raised.
    """
    if isinstance(error, InputError):
        return error
    reason = reason_of(error)
    if files:
        if files[0].endswith(("json", "jsonl")):
            reason = next(filter(None, map(find_invalid_json, files)), reason)
        return InputError(f"The file {name!r} cannot be read: {reason.rstrip('.')}.")
    kind = "folder" if os.path.exists(name) else "data set"
    return InputError(
        f"The {kind} {name!r} cannot be loaded: {reason} Give the id of a data set on the Hub, a folder of images with "
        "a metadata.jsonl, or a file of rows."
    )


def reason_of(error: Exception) -> str:
    """Return why a reader failed, as one line.

    Args:
        error: the error that `datasets` raised. Its cause is the error of the file reader.
    """
    cause = error.__cause__ or error
    first_line = (str(cause).splitlines() or [""])[0]
    reason = one_line(first_line, MAX_REASON_CHARACTERS).removeprefix("Error tokenizing data. C error: ")
    if isinstance(cause, StopIteration) or "corresponds to no data" in reason:
        return "it has no rows"
    return f"{reason} is missing" if isinstance(cause, KeyError) else reason


def find_invalid_json(file: str) -> str | None:
    """Return the position of the first invalid JSON in a file, or `None` if the file is valid JSON or JSON lines."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                return f"line {error.lineno} is not valid JSON ({error.msg})"
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    json.loads(line or "0")
                except json.JSONDecodeError as line_error:
                    return f"line {number} of {os.path.basename(file)} is not valid JSON ({line_error.msg})"
    except (OSError, RecursionError, ValueError) as error:  # not UTF-8, or numbers of thousands of digits
        return one_line(error, MAX_REASON_CHARACTERS)
    return None
