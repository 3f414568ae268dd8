"""Shards: the files that hold the precomputed features of a split."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from ..common.errors import InputError, one_line
from ..common.files import atomic_path, write_atomically
from .skipped_rows import SkippedRow


class FeatureBatch(NamedTuple):
    """Features of consecutive rows, in the format in which they are stored.

    Attributes:
        values: `[F, Dv]`, the features of all views one after the other. In a split whose rows are equally long, rows
            without features hold zeros. In another split they have no features.
        lengths: number of features of each view, int64 `[rows, views]`.
        skipped: entries of the rows without features, with the reasons.
    """

    values: np.ndarray
    lengths: np.ndarray
    skipped: list[SkippedRow]

    @classmethod
    def from_tensor(
        cls, values: torch.Tensor, lengths: np.ndarray, rows: range, skipped: list[SkippedRow], layout: "SplitLayout"
    ) -> "FeatureBatch":
        """Place the features of readable rows among all rows.

        Rows whose features are not finite are skipped.

        Args:
            values: `[F, Dv]`, the features of the R rows that are not skipped, one after the other.
            lengths: number of features of each of their views, int64 `[R, views]`.
            rows: numbers of all rows of the batch.
            skipped: entries of the rows without features.
            layout: the layout of the split.

        Raises:
            InputError: if rows differ in their number of features and the layout does not allow it, or if a feature is
                too large for the dtype.
        """
        split, num_features, width = layout.folder.name, layout.shape[0], layout.shape[1]
        without = {entry["row"] for entry in skipped}
        present = [row for row in rows if row not in without]
        ends = lengths.sum(axis=1).cumsum()
        finite = values.isfinite().all(dim=1).cpu().numpy()
        stored = values.to(getattr(torch, layout.dtype)).cpu().numpy()
        all_lengths = np.full((len(rows), layout.views), num_features or 0, np.int64)
        pieces = [np.zeros((all_lengths[0].sum(), width), layout.dtype)] * len(rows)
        not_finite: list[SkippedRow] = []
        for row, own_lengths, start, end in zip(present, lengths, ends - lengths.sum(axis=1), ends, strict=True):
            if num_features is not None and (own_lengths != num_features).any():
                raise InputError(
                    f"Row {row} of {split!r} has {own_lengths.max()} features and other rows {num_features}: its image "
                    "has an unusual size. Leave it out, or resize it."
                )
            if not finite[start:end].all():
                reason = "Its features are not finite."
                not_finite.append({"split": split, "row": row, "file": None, "reason": reason})
            elif not np.isfinite(stored[start:end]).all():
                raise InputError(f"Features of row {row} of {split!r} do not fit {layout.dtype}: use --dtype float32.")
            else:
                pieces[row - rows.start] = stored[start:end]
                all_lengths[row - rows.start] = own_lengths
        skipped = sorted(skipped + not_finite, key=lambda entry: entry["row"] or 0)
        return cls(np.concatenate(pieces), all_lengths, skipped)


@dataclass(frozen=True)
class SplitLayout:
    """Layout of the shards of a split. Row `r` is in shard `r // rows_per_shard`.

    Args:
        folder: folder of the shards, which has the name of the split.
        rows: number of rows of the split.
        rows_per_shard: number of rows in a shard. The last shard may have fewer.
        views: number of views of each row.
        shape: shape `(N, Dv)` of one view. N is `None` if views differ in their number of features.
        dtype: "float16" or "float32".

    Raises:
        ValueError: if the numbers or the dtype are not valid.
    """

    folder: Path
    rows: int
    rows_per_shard: int
    views: int
    shape: tuple[int | None, int]
    dtype: str

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or self.dtype not in ("float16", "float32"):
            raise ValueError(f"features must be [N, D] in float16 or float32, not {list(self.shape)} in {self.dtype!r}")
        sizes = [self.rows, self.rows_per_shard, self.views, *(size for size in self.shape if size is not None)]
        is_valid = self.shape[1] is not None and all(type(size) is int for size in sizes)
        if not is_valid or self.rows < 0 or min(sizes[1:]) < 1:
            raise ValueError(f"rows, views and shape must be positive integers, not {sizes}")

    @property
    def is_ragged(self) -> bool:
        """`True` if views differ in their number of features."""
        return self.shape[0] is None

    @property
    def feature_bytes(self) -> int:
        """Size of one feature `[Dv]` in bytes."""
        return self.shape[1] * np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> range:
        """Numbers of the shards."""
        return range(-(-self.rows // self.rows_per_shard))

    def rows_of(self, shard: int) -> range:
        """Return the numbers of the rows in a shard."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def bytes_of(self, shard: int, mean_length: float) -> int:
        """Return the size of a shard in bytes, without its header.

        Args:
            shard: number of the shard.
            mean_length: mean number of features of a view.
        """
        return round(len(self.rows_of(shard)) * self.views * mean_length * self.feature_bytes)

    def shape_of(self, shard: int, num_features: int = 0) -> tuple[int, ...]:
        """Return the shape of the array in a shard: `(rows, views, N, Dv)`, or `(F, Dv)` if views differ in length.

        Args:
            shard: number of the shard.
            num_features: number of features in a shard whose views differ in length, F.
        """
        length, width = self.shape
        return (num_features, width) if length is None else (len(self.rows_of(shard)), self.views, length, width)

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"{shard:05d}.npy"

    def offsets_path(self, shard: int) -> Path:
        """Return the file that says where the views of a shard begin. It does not exist if all are equally long."""
        return self.folder / f"{shard:05d}.offsets.npy"

    def skipped_path(self, shard: int) -> Path:
        """Return the file that lists the rows of a shard without features.

        The file does not exist if all rows have features.
        """
        return self.folder / f"{shard:05d}.skipped.jsonl"

    @property
    def keys_path(self) -> Path:
        """File of the keys that identify the rows' images, `[rows]` of uint64. Columns of embeddings have no keys."""
        return self.folder / "rows.npy"

    def locate(self, shard: int) -> tuple[int, np.ndarray | None]:
        """Return where the features of a shard are.

        Returns:
            The position in the file at which the features begin. If views differ in length, also the number of features
            in front of each view and of the end, int64 `[rows * views + 1]`; otherwise `None`.

        Raises:
            OSError: if a file does not exist or is too short.
            ValueError: if it is not a numpy file, or holds an array of another shape or dtype, or offsets that
                decrease.
        """
        if not self.is_ragged:
            return self._open(self.path(shard), self.shape_of(shard), self.dtype).offset, None
        num_views = len(self.rows_of(shard)) * self.views
        offsets = np.array(self._open(self.offsets_path(shard), (num_views + 1,), "int64"))
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError(f"the offsets in {self.offsets_path(shard).name!r} do not rise from 0")
        return self._open(self.path(shard), self.shape_of(shard, offsets[-1].item()), self.dtype).offset, offsets

    @staticmethod
    def _open(path: Path, shape: tuple[int, ...], dtype: str) -> np.memmap:
        """Read the header of a numpy file, and check its size."""
        array = np.lib.format.open_memmap(path, mode="r")
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{path.name!r} holds {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}")
        assert isinstance(array, np.memmap)
        return array

    def is_complete(self, shard: int) -> bool:
        """Return whether the files of a shard exist and are complete."""
        try:
            self.locate(shard)
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
        skipped: list[SkippedRow] = []
        lengths: list[np.ndarray] = []
        with atomic_path(self.path(shard)) as unfinished:
            with unfinished.open("wb") as file:
                self._write_header(file, shard, 0)
                for batch in batches:
                    file.write(np.ascontiguousarray(batch.values).data)
                    lengths.append(batch.lengths)
                    skipped += batch.skipped
                if self.is_ragged:  # only now the number of features is known, which fits into the space of the header
                    offsets = np.concatenate([[0], *(own.ravel() for own in lengths)]).cumsum()
                    file.seek(0)
                    self._write_header(file, shard, offsets[-1].item())
                file.flush()
                os.fsync(file.fileno())  # otherwise a power failure could leave a file of zeros
            if self.is_ragged:
                with atomic_path(self.offsets_path(shard)) as path, path.open("wb") as file:
                    np.save(file, offsets)
            self.skipped_path(shard).unlink(missing_ok=True)
            if skipped:
                write_atomically(self.skipped_path(shard), "".join(json.dumps(entry) + "\n" for entry in skipped))

    def _write_header(self, file: IO[bytes], shard: int, num_features: int) -> None:
        """Write the header of a numpy file, whose length does not depend on the number of features."""
        shape = self.shape_of(shard, num_features)
        header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)

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
