"""Shards: the files that hold the precomputed features of a split."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..common.errors import InputError, one_line
from ..common.files import atomic_path, write_atomically
from .skipped_rows import SkippedRow


class FeatureBatch(NamedTuple):
    """Features of consecutive rows, in the format in which they are stored.

    Attributes:
        features: `[rows, views, N, Dv]`. Rows without features hold zeros.
        skipped: entries of the rows without features, with the reasons.
    """

    features: np.ndarray
    skipped: list[SkippedRow]

    @classmethod
    def from_tensor(
        cls,
        features: torch.Tensor | None,
        split: str,
        rows: range,
        skipped: list[SkippedRow],
        shape: tuple[int, ...],
        dtype: str,
    ) -> "FeatureBatch":
        """Place the features of readable rows among all rows.

        Skipped rows are zero, and features that are not finite are skipped.

        Args:
            features: `[R, views, N, Dv]` of the rows that are not skipped; `None` if all rows are skipped.
            split: name of the split.
            rows: numbers of all rows of the batch.
            skipped: entries of the rows without features.
            shape: `(views, N, Dv)`.
            dtype: dtype of the stored features, "float16" or "float32".

        Raises:
            InputError: if a feature is too large for the dtype.
        """
        array = np.zeros((len(rows), *shape), dtype)
        if features is None:
            return cls(array, skipped)
        without = {entry["row"] for entry in skipped}
        present = [row for row in rows if row not in without]
        finite = features.isfinite().flatten(1).all(1).tolist()
        stored = features.to(getattr(torch, dtype)).cpu().numpy()
        not_finite: list[SkippedRow] = []
        for row, is_finite, values in zip(present, finite, stored, strict=True):
            if not is_finite:
                reason = "Its features are not finite."
                not_finite.append({"split": split, "row": row, "file": None, "reason": reason})
            elif not np.isfinite(values).all():
                raise InputError(f"Features of row {row} of {split!r} do not fit {dtype}: use --dtype float32.")
            else:
                array[row - rows.start] = values
        return cls(array, sorted(skipped + not_finite, key=lambda entry: entry["row"] or 0))


@dataclass(frozen=True)
class SplitLayout:
    """Layout of the shards of a split. Row `r` is in shard `r // rows_per_shard`.

    Args:
        folder: folder of the shards.
        rows: number of rows of the split.
        rows_per_shard: number of rows in a shard. The last shard may have fewer.
        views: number of views of each image.
        shape: shape `(N, Dv)` of one view.
        dtype: "float16" or "float32".

    Raises:
        ValueError: if the numbers or the dtype are not valid.
    """

    folder: Path
    rows: int
    rows_per_shard: int
    views: int
    shape: tuple[int, int]
    dtype: str

    def __post_init__(self) -> None:
        sizes = (self.rows, self.rows_per_shard, self.views, *self.shape)
        if not all(type(size) is int for size in sizes) or self.rows < 0 or min(sizes[1:]) < 1:
            raise ValueError(f"rows, views and shape must be positive integers, not {list(sizes)}")
        if len(self.shape) != 2 or self.dtype not in ("float16", "float32"):
            raise ValueError(f"features must be [N, D] in float16 or float32, not {list(self.shape)} in {self.dtype!r}")

    @property
    def view_bytes(self) -> int:
        """Size of one view in bytes."""
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.rows // self.rows_per_shard))

    def rows_of(self, shard: int) -> range:
        """Return the numbers of the rows in a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def shape_of(self, shard: int) -> tuple[int, ...]:
        """Return the shape of the array in a shard, `(rows, views, N, Dv)`."""
        return (len(self.rows_of(shard)), self.views, *self.shape)

    def bytes_of(self, shard: int) -> int:
        """Return the size of a shard in bytes, without its header."""
        return len(self.rows_of(shard)) * self.views * self.view_bytes

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{shard:05d}.npy"

    def skipped_path(self, shard: int) -> Path:
        """Return the file that lists the rows of a shard without features.

        The file does not exist if all rows have features.
        """
        return self.folder / f"{shard:05d}.skipped.jsonl"

    @property
    def keys_path(self) -> Path:
        """File of the keys that identify the rows' images, `[rows]` of uint64. Columns of embeddings have no keys."""
        return self.folder / "rows.npy"

    def data_offset(self, shard: int) -> int:
        """Return the position in the file of a shard at which the features begin.

        Raises:
            OSError: if the file does not exist or is too short.
            ValueError: if it is not a numpy file, or holds an array of another shape or dtype.
        """
        array = np.lib.format.open_memmap(self.path(shard), mode="r")  # reads the header and checks the size
        expected = self.shape_of(shard)
        if array.shape != expected or array.dtype != self.dtype:
            raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not {self.dtype} {list(expected)}")
        assert isinstance(array, np.memmap)
        return array.offset

    def is_complete(self, shard: int) -> bool:
        """Return whether the file of a shard exists and is complete."""
        try:
            self.data_offset(shard)
        except (OSError, ValueError):
            return False
        return True

    def write(self, shard: int, batches: Iterable[FeatureBatch]) -> None:
        """Write a shard atomically.

        A kill leaves a file with the suffix `.tmp`, see [`remove_unfinished`].

        Args:
            shard: number of the shard.
            batches: its rows, in order.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": self.shape_of(shard)}
        skipped: list[SkippedRow] = []
        with atomic_path(self.path(shard)) as unfinished:
            with unfinished.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for features, entries in batches:
                    file.write(np.ascontiguousarray(features).data)
                    skipped += entries
                file.flush()
                os.fsync(file.fileno())  # otherwise a power failure could leave a file of zeros
            self.skipped_path(shard).unlink(missing_ok=True)
            if skipped:
                write_atomically(self.skipped_path(shard), "".join(json.dumps(entry) + "\n" for entry in skipped))

    def skipped_lines(self) -> Iterator[str]:
        """Yield the JSON lines of all rows without features."""
        for shard in self.shards:
            if self.skipped_path(shard).exists():
                yield from self.skipped_path(shard).read_text().splitlines()


def remove_unfinished(folder: Path) -> None:
    """Delete the unfinished files of killed runs in a folder."""
    for path in folder.glob("*.tmp"):
        path.unlink()


def damaged_file(path: Path, error: object) -> InputError:
    """Return the error for a file of precomputed features that is missing or not valid."""
    reason = one_line(error, 200).removesuffix(".")
    return InputError(
        f"The file {str(path)!r} of the features is missing or damaged ({reason}): give the same command of "
        "precompute_features.py again to restore it."
    )
