"""TODO."""

import json
import os
from pathlib import Path


class SkippedRows:
    """The rows that could not be used: split, row number, file and reason of each.

    They wait in memory until the run owns its output folder and says where to write them. Data-loading processes append
    to the same JSON-lines file, so a row may stand there more than once; it counts once. What a kill left of a line
    counts as not there.

    The rows of a stream have no numbers: `row` is null, and `place` is where the row came in the stream's own order.
    """

    def __init__(self):
        self.path: Path | None = None
        self.waiting: list[dict] = []
        self.known: set[str] = set()  # in this process

    def add(self, split: str, row: int | None, file: str | None, reason: str, place: int | None = None) -> None:
        entry = {"split": split, "row": row, "file": file, "reason": reason}
        if place is not None:
            entry["place"] = place
        if (line := json.dumps(entry)) in self.known:
            return
        self.known.add(line)
        if self.path is None:
            self.waiting.append(entry)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        with self.path.open("a") as lines:
            lines.write(line + "\n")

    def write_to(self, path: str | os.PathLike) -> None:
        """Write what there is, and from now on everything, to this file, behind what a killed run left there."""
        self.path = Path(path)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._write("")
        for entry in self.waiting:
            self._write(json.dumps(entry))
        self.waiting = []

    def __len__(self) -> int:
        lines = [json.dumps(entry) for entry in self.waiting]
        if self.path is not None and self.path.exists():
            lines += self.path.read_text(errors="replace").split("\n")
        rows = set()
        for line in lines:
            try:
                entry = json.loads(line)
                rows.add((entry["split"], entry["row"], entry.get("place")))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        return len(rows)
