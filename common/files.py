"""Files that survive a kill: atomic writes, and JSON lines of which the last may be cut off."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that a kill leaves either the old file or the complete new one.

    Args:
        path: the file. The text is first written to a file beside it with the suffix `.tmp`.
        text: its content, encoded as UTF-8.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_json_lines(path: str | os.PathLike) -> Iterator[Any]:
    """Yield the values of a JSON-lines file and skip every line that is not valid JSON.

    A process that is killed while it appends a line leaves part of it behind. Such a line is skipped.

    Raises:
        OSError: if the file cannot be read.
    """
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):  # cut off or empty; brackets nested too deep
            continue
