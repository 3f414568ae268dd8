"""Record of rows that cannot be used, in memory and in a JSON-lines file."""

import json
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ..common.errors import one_line
from ..common.files import read_json_lines
from ..common.logging import get_logger

logger = get_logger(__name__)

MAX_FILE_CHARACTERS = 200  # a row may hold a whole image as text in place of a path
MAX_REASON_CHARACTERS = 500
LOGGED_ROWS = 3


class SkippedRow(TypedDict):
    """Entry of the record.

    A row of a stream has no index. Its `row` is `None`, and `place` is its position in the first pass.
    """

    split: str
    row: int | None
    file: str | None
    reason: str
    place: NotRequired[int]


def skipped_row(split: str, row: int | None, file: str | None, reason: object) -> SkippedRow:
    """Return an entry whose texts are cut to a readable length.

    Args:
        split: name of the split.
        row: number of the row; `None` for a row of a stream, and for a file that is not part of a row.
        file: path of its image, if it has one.
        reason: why it cannot be used, or the error that says so.
    """
    if file is not None and len(file) > MAX_FILE_CHARACTERS:
        file = f"{file[: MAX_FILE_CHARACTERS // 4]}... ({len(file):,} characters)"
    return {"split": split, "row": row, "file": file, "reason": one_line(reason, MAX_REASON_CHARACTERS)}


class SkippedRows:
    """Record of the rows that cannot be used, with the reasons.

    Entries stay in memory until the run has claimed its output folder and calls [`~SkippedRows.write_to`]. The workers
    of a data loader then append to the same file. A row may therefore occur several times in the file, but counts once.

    Attributes:
        pending: entries that are not yet in a file.

    Example:

    ```python
    >>> skipped = SkippedRows()
    >>> skipped.add("train", 7, "photos/7.jpg", "The image 'photos/7.jpg' cannot be read.")
    >>> len(skipped), skipped.pending[0]["row"]
    (1, 7)
    ```
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.pending: list[SkippedRow] = []
        self._known: set[str] = set()  # entries that this process has added

    def add(self, split: str, row: int | None, file: str | None, reason: str, place: int | None = None) -> None:
        """Record a row, unless this process has recorded it before. The first few are also logged.

        Args:
            split: name of the split.
            row: number of the row; `None` for a row of a stream, and for a file that is not part of a row.
            file: path of its image, if it has one.
            reason: why it cannot be used.
            place: position in the first pass, for a row of a stream.
        """
        entry = skipped_row(split, row, file, reason)
        if place is not None:
            entry["place"] = place
        line = json.dumps(entry)
        if line in self._known:
            return
        self._known.add(line)
        if len(self._known) <= LOGGED_ROWS:
            what = "A row" if row is None else f"Row {row}"
            name = f" ({entry['file']})" if entry["file"] else ""
            logger.info("%s of %s%s is skipped: %s", what, split, name, entry["reason"])
        if self.path is None:
            self.pending.append(entry)
        else:
            self._append(line)

    def write_to(self, path: str | os.PathLike) -> None:
        """Append the pending entries and all later entries to a file.

        The file may exist from an interrupted run. If its last line was cut off, the entries start on a new line.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._append("")
        for entry in self.pending:
            self._append(json.dumps(entry))
        self.pending = []

    def _append(self, line: str) -> None:
        assert self.path is not None
        with self.path.open("a") as file:
            file.write(line + "\n")

    def __len__(self) -> int:
        """Return the number of different rows in memory and in the file."""
        entries: list[Any] = list(self.pending)
        if self.path is not None and self.path.exists():
            entries += read_json_lines(self.path)
        rows = {
            json.dumps([entry["split"], entry["row"], entry.get("place", entry["row"] is None and entry.get("file"))])
            for entry in entries
            if isinstance(entry, dict) and {"split", "row"} <= entry.keys()
        }
        return len(rows)
