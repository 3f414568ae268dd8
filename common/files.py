"""Atomic writing of files, and reading of JSON-lines files whose last line may be cut off."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and move the file written there to `path` at the end.

    A kill keeps the old file and leaves a file whose name ends in `.tmp`. An exception keeps only the old file.

    Args:
        path: the file to write, or a folder that does not exist yet.

    Example:

    ```python
    with atomic_path("features.npy") as unfinished, unfinished.open("wb") as file:
        numpy.save(file, features)
    ```
    """
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # the name is unique to this process
    try:
        yield unfinished
    except BaseException:
        if not unfinished.is_dir():
            unfinished.unlink(missing_ok=True)
        raise
    unfinished.replace(path)


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
    """Write a file so that readers find either the old content or the new content, never a part.

    Args:
        path: the file.
        content: text, which is encoded as UTF-8, or bytes.
    """
    with atomic_path(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def read_json_lines(path: str | os.PathLike) -> Iterator[Any]:
    """Yield the values of a JSON-lines file, and leave out lines that are not valid JSON.

    A killed process may have cut off a line at any byte. Callers check the structure of each value.

    Args:
        path: the file.

    Raises:
        OSError: if the file cannot be read.
    """
    # `splitlines` would also split at characters such as U+2028, which JSON strings may hold.
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            continue
