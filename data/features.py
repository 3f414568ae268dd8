"""Features of images on disk: what a vision encoder says of every image, computed once by `precompute_features.py`.

A store is a folder of plain files:

    index.json                  which vision encoder, which data set, how many rows; written last
    skipped_rows.jsonl          the rows that have no features, and why
    train/rows.npy              what tells the rows apart, so that nobody reads features of other images
    train/00000.npy             `[rows, views, N, Dv]`, so many rows of the split, zeros where there are no features
    train/00000.skipped.jsonl   the skipped rows of these, where there are any
    run.json                    what the run that made it was asked for

Rows are read with `pread` and not through a memory map: the pages of a map count as memory of the process until it
ends, and a disk that fails kills the process instead of raising an error.
"""

import json
import os
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
from transformers import BaseImageProcessor

from ..common.errors import InputError
from .feature_shards import DATASET_FIELDS, FORMAT, INDEX, SKIPPED, SPLIT_NAME, SplitLayout, VisionKey, row_keys

OPEN_FILES = 512  # of a split at a time; a process may have 1024 in all on most systems


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


class FeatureStore:
    """The features of a data set's images, by split.

    Args:
        folder: what `precompute_features.py` made.

    Raises:
        InputError: if the folder is no store, or one that is not finished or is damaged.

    Example:

    ```python
    >>> store = FeatureStore("features")  # doctest: +SKIP
    >>> train = store.split("train")  # doctest: +SKIP
    >>> train.read([5, 0, 17]).shape  # doctest: +SKIP
    torch.Size([3, 50, 768])
    ```
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / INDEX
        if not path.is_file():
            if (self.folder / "run.json").is_file():
                raise InputError(
                    f"The features in {str(folder)!r} are not finished: give the same command of "
                    "precompute_features.py again, and it goes on."
                )
            raise InputError(f"There are no features in {str(folder)!r}: make them with precompute_features.py.")
        try:
            index = json.loads(path.read_text())
            version = index["format"]
            if version == FORMAT:
                self.vision = VisionKey(**index["vision_model"])
                self.dataset = {name: index["dataset"].get(name) for name in DATASET_FIELDS}
                names = (self.vision.name_or_path, *filter(None, self.dataset.values()), *index["splits"])
                if not all(isinstance(name, str) for name in names):
                    raise TypeError("a name in it is no text")
                for name in index["splits"]:
                    if not re.fullmatch(SPLIT_NAME, name):
                        raise ValueError(f"no folder is called {name!r}")
                self.layouts = {
                    name: SplitLayout(self.folder / name, **{**fields, "shape": tuple(fields["shape"])})
                    for name, fields in index["splits"].items()
                }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise damaged(path, error) from error
        if version != FORMAT:
            raise InputError(
                f"The features in {str(folder)!r} are of format {version}, and this version reads {FORMAT}: make them "
                "again with precompute_features.py --overwrite_output_dir."
            )

    @property
    def vision_model_name_or_path(self) -> str:
        return self.vision.name_or_path

    @property
    def vision_model_revision(self) -> str | None:
        """Its commit on the Hub; `None` for a folder."""
        return self.vision.revision

    def check(self, name_or_path: str, revision: str | None, image_processor: BaseImageProcessor) -> None:
        """Make sure that the features are those of this vision encoder.

        Raises:
            InputError: if they are another's, or of images that were prepared otherwise.
            OSError: if the model cannot be found.
        """
        asked = VisionKey.of(name_or_path, revision, image_processor)
        remedy = "Choose other features, or make these with precompute_features.py."
        if not self.vision.same_weights(asked):
            raise InputError(
                f"The features in {str(self.folder)!r} are those of the vision model {self.vision}, not of {asked}. "
                f"{remedy}"
            )
        theirs, ours = self.vision.image_processor, asked.image_processor
        if different := [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]:
            key = different[0]
            raise InputError(
                f"The features in {str(self.folder)!r} are of images that another image processor prepared: it "
                f"differs in {', '.join(different)} ({key} was {theirs.get(key)!r}, now {ours.get(key)!r}). {remedy}"
            )

    def split(self, name: str) -> "SplitFeatures":
        """The features of a split.

        Raises:
            InputError: if there are none, or files of it are missing or damaged.
        """
        if name not in self.layouts:
            there = ", ".join(map(repr, self.layouts))
            raise InputError(f"The features in {str(self.folder)!r} have no split {name!r}; they have {there}.")
        return SplitFeatures(self.layouts[name], self._reasons(name))

    def _reasons(self, name: str) -> dict[int, str]:
        path = self.folder / SKIPPED
        try:
            entries = map(json.loads, path.read_text().splitlines())
            reasons = {entry["row"]: entry["reason"] for entry in entries if entry["split"] == name}
            if wrong := [row for row in reasons if type(row) is not int or not 0 <= row < self.layouts[name].rows]:
                raise ValueError(f"there is no row {wrong[0]!r}")
            return reasons
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise damaged(path, error) from error


class SplitFeatures:
    """The features of a split's images, row by row as [`~sources.load_rows`] gives them.

    It can be handed to other processes and read by several threads. What it needs in memory does not depend on how many
    rows there are or have been read, but for a bit for each: `present`.

    Attributes:
        views: of each image; 0 is the whole image, the others are random parts of it.
        shape: `(N, Dv)` of one view.
        dtype: `torch.float16` or `torch.float32`.
        present: bool `[rows]`, `False` where the image could not be read.
        reasons: why, by row.

    Raises:
        InputError: if a shard is missing or damaged.
    """

    def __init__(self, layout: SplitLayout, reasons: dict[int, str]):
        self.layout = layout
        self.views = layout.views
        self.shape = layout.shape
        self.dtype = getattr(torch, layout.dtype)
        self.reasons = reasons
        self._files: dict[int, tuple] = {}
        self._memory = _Memory()
        self._starts = [self._start_of(shard) for shard in layout.shards]  # first of all: so many rows there are
        self.present = np.ones(layout.rows, dtype=bool)
        self.present[list(reasons)] = False

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}, "_memory": _Memory()}

    def __len__(self) -> int:
        return self.layout.rows

    def check_rows(self, images: datasets.Dataset, column: str) -> None:
        """Make sure that the features are those of these rows, or of these and more behind them.

        Raises:
            InputError: if they are of other images, or in another order.
        """
        if not self.layout.keys_path.is_file():
            return
        try:
            keys = np.lib.format.open_memmap(self.layout.keys_path, mode="r")
            if keys.ndim != 1 or keys.dtype != np.uint64:
                raise ValueError(f"it holds {keys.dtype} {list(keys.shape)}")
        except (OSError, ValueError) as error:
            raise damaged(self.layout.keys_path, error) from error
        expected = row_keys(images, column)
        same = keys[: len(expected)] == expected if len(expected) <= len(keys) else np.zeros(1, dtype=bool)
        if not same.all():
            raise InputError(
                f"The features in {str(self.layout.folder)!r} are those of other images, or in another order, from row "
                f"{int(same.argmin())} on: the data set has changed, or is another one. Precompute them again."
            )

    def __getitem__(self, row: int | tuple[int, int]) -> torch.Tensor:
        """Features `[N, Dv]` of a row's whole image, or of a view: `features[row, view]`."""
        row, view = row if isinstance(row, tuple) else (row, 0)
        if not -len(self) <= row < len(self):
            raise IndexError(f"There are {len(self)} rows, and no row {row}.")  # also what ends a `for` loop
        return self.read([row % len(self)], [view])[0]

    def read(self, rows: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | None = None) -> torch.Tensor:
        """Read features of several rows, in any order: `[B, N, Dv]` in the store's dtype.

        Args:
            rows: numbers of rows.
            views: which view of each; by default the whole image.

        Raises:
            IndexError: for a row or view that there is not.
            ValueError: for a row without features.
            InputError: if a shard has become damaged.
        """
        rows = np.asarray(rows, dtype=np.int64)
        views = np.zeros_like(rows) if views is None else np.asarray(views, dtype=np.int64)
        if ((rows < 0) | (rows >= len(self)) | (views < 0) | (views >= self.views)).any():
            raise IndexError(f"There are {len(self)} rows of {self.views} views each, numbered from 0.")
        if not self.present[rows].all():
            row = rows[~self.present[rows]][0].item()
            raise ValueError(f"Row {row} has no features: {self.reasons[row]} Leave out the rows that are not present.")
        shards, places = np.divmod(rows, self.layout.rows_per_shard)
        size = self.layout.view_bytes
        positions = (places * self.views + views) * size
        files = {shard: self._file(shard) for shard in np.unique(shards).tolist()}
        array = self._memory.take((len(rows), *self.shape), self.layout.dtype)
        memory = memoryview(array).cast("B") if rows.size else b""
        begins = range(0, len(rows) * size, size)
        for begin, shard, position in zip(begins, shards.tolist(), positions.tolist(), strict=True):
            file, start = files[shard]
            if os.preadv(file.fileno(), [memory[begin : begin + size]], start + position) != size:
                raise damaged(self.layout.path(shard), "it is cut off")
        return torch.from_numpy(array)

    def _file(self, shard: int) -> tuple:
        """The open file of a shard, and where its numbers begin."""
        found = self._files.get(shard)
        if found is None:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files)), None)  # closed when nobody reads from it any more
            found = self.layout.path(shard).open("rb", buffering=0), self._starts[shard]
            self._files[shard] = found
        return found

    def _start_of(self, shard: int) -> int:
        try:
            return self.layout.start_of(shard)
        except (OSError, ValueError) as error:
            raise damaged(self.layout.path(shard), error) from error


class _Memory:
    """Memory of batches, used again when the last tensor that sees it is gone.

    The system hands out fresh memory page by page, each filled with zeros. For a large batch that takes longer than to
    read it.
    """

    def __init__(self):
        self.free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            memory = self.free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        if memory.nbytes < size:
            memory = np.empty(size, np.uint8)
        array = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, memory).atexit = False
        return array

    def _give_back(self, memory: np.ndarray) -> None:
        if len(self.free) < 4:
            self.free.append(memory)


def damaged(path: Path, error: object) -> InputError:
    text = " ".join(str(error).split()).removesuffix(".")
    return InputError(
        f"The file {str(path)!r} of the features is missing or damaged ({text}): give the same command of "
        "precompute_features.py again, and it is made anew."
    )
