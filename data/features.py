"""Reader of precomputed features, by row or in batches."""

import os
import weakref
from collections.abc import Sequence
from typing import IO, NamedTuple

import datasets
import numpy as np
import torch

from ..common.errors import InputError, one_line
from .feature_shards import SplitLayout, damaged_file
from .images import image_keys

MAX_OPEN_FILES = 512  # per split; most systems allow a process 1024 in total
MAX_FREE_BUFFERS = 4


class PaddedFeatures(NamedTuple):
    """Features of a batch of rows, as [`QFormerCaptioner`] takes them.

    Attributes:
        image_embeds: `[B, N, Dv]`. Shorter rows end in zeros.
        image_attention_mask: bool `[B, N]`, `True` for a feature and `False` for padding; `None` if all rows are
            equally long.
    """

    image_embeds: torch.Tensor
    image_attention_mask: torch.Tensor | None


class SplitFeatures:
    """Precomputed features of the rows of a split, in the order in which [`load_rows`] returns the rows.

    The object can be pickled, and several threads can read from it. Its memory does not grow with the number of rows
    that have been read. If rows differ in length, it holds the place of each view, which takes 8 bytes.

    Rows are read with `pread` instead of a memory map. Pages of a memory map count as memory of the process until it
    ends. With a map, a failing disk would also kill the process instead of raising an error.

    Args:
        layout: layout of the shards.
        reasons: for each row without features, the reason.

    Attributes:
        views (`int`): number of views of each row. View 0 is the whole image, the others are random crops.
        shape (`tuple[int | None, int]`): `(N, Dv)` of one view. N is `None` if views differ in length.
        dtype: `torch.float16` or `torch.float32`.
        present: bool `[rows]`, `False` for rows without features.

    Raises:
        InputError: if a shard is missing or damaged.
    """

    def __init__(self, layout: SplitLayout, reasons: dict[int, str]):
        self.layout = layout
        self.views = layout.views
        self.shape = layout.shape
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        self.reasons = reasons
        self._files: dict[int, tuple[IO[bytes], int]] = {}
        self._buffers = BufferPool()
        places = [self._locate(shard) for shard in layout.shards]  # first, to check that all files exist
        self._positions = [position for position, _ in places]
        # Each shard has one offset more than views. The view `i` of all is at `i + shard`.
        offsets = [offsets for _, offsets in places if offsets is not None]
        self._offsets = np.concatenate([np.zeros(0, np.int64), *offsets]) if layout.is_ragged else None
        self.present = np.ones(layout.rows, dtype=bool)
        self.present[list(reasons)] = False
        if self._offsets is not None:
            self._check_lengths()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}, "_buffers": BufferPool()}

    def __len__(self) -> int:
        return self.layout.rows

    def check_length(self, split: str, num_rows: int) -> None:
        """Check that there are features for all rows of a split.

        Raises:
            InputError: if there are fewer rows of features.
        """
        if len(self) < num_rows:
            raise InputError(
                f"The {split} split has {num_rows} rows, but features exist for only {len(self)} of them: precompute "
                "them again."
            )

    def versions(self, rows: Sequence[int]) -> list[str]:
        """Return a text for each row that changes if its file of features is replaced."""
        shards = {row // self.layout.rows_per_shard for row in rows}
        status = {shard: self.layout.path(shard).stat() for shard in shards}
        texts = {shard: f"{file.st_size}-{file.st_mtime_ns}" for shard, file in status.items()}
        return [f"{row}-{texts[row // self.layout.rows_per_shard]}" for row in rows]

    @property
    def have_keys(self) -> bool:
        """`True` if the features were computed from images, whose keys are stored."""
        return self.layout.keys_path.is_file()

    def check_rows(self, images: datasets.Dataset, column: str) -> None:
        """Check that the features belong to these rows. The store may have features of additional rows after them.

        Args:
            images: undecoded images, as [`undecoded_images`] returns them.
            column: the column that holds them.

        Raises:
            InputError: if the features belong to other images, or to the same images in another order.
        """
        if not self.have_keys:
            return
        path = self.layout.keys_path
        try:
            keys = np.lib.format.open_memmap(path, mode="r")
            if keys.ndim != 1 or keys.dtype != np.uint64:
                raise ValueError(f"it holds {keys.dtype} {list(keys.shape)}")
        except (OSError, ValueError) as error:
            raise damaged_file(path, error) from error
        expected = image_keys(images, column)
        same = keys[: len(expected)] == expected if len(expected) <= len(keys) else np.zeros(1, dtype=bool)
        if not same.all():
            raise InputError(
                f"The features in {str(self.layout.folder)!r} belong to other images, or to another order, from row "
                f"{int(same.argmin())} on. The data set has changed, or is a different one: precompute them again."
            )

    def __getitem__(self, row: int | tuple[int, int]) -> torch.Tensor:
        """Return the features `[N, Dv]` of a row's whole image, or of one view: `features[row, view]`.

        Raises:
            IndexError: if the row or the view does not exist. This also ends a `for` loop.
        """
        row, view = row if isinstance(row, tuple) else (row, 0)
        if not -len(self) <= row < len(self):
            raise IndexError(f"There are {len(self)} rows; row {row} does not exist.")
        return self.read([row % len(self)], [view]).image_embeds[0]

    def read(self, rows: Sequence[int] | np.ndarray, views: Sequence[int] | np.ndarray | None = None) -> PaddedFeatures:
        """Read the features of rows, in any order, and pad them to the length of the longest.

        Args:
            rows: numbers of the rows.
            views: number of the view of each row; by default 0, the whole image.

        Returns:
            The features `[B, N, Dv]` in the dtype of the store, and their mask. The data is copied once, from the files
            into the batch.

        Raises:
            IndexError: if a row or view does not exist.
            ValueError: if a row has no features.
            InputError: if a shard has been damaged since it was opened.

        Example:

        ```python
        >>> embeds, mask = FeatureStore("features").split("train").read([5, 0, 17])  # doctest: +SKIP
        >>> embeds.shape, mask.sum(dim=1)  # doctest: +SKIP
        (torch.Size([3, 50, 768]), tensor([50, 31, 44]))
        ```
        """
        rows = np.asarray(rows, dtype=np.int64)
        views = np.zeros_like(rows) if views is None else np.asarray(views, dtype=np.int64)
        self._check_indices(rows, views)
        shards, starts, lengths = self._places(rows, views)
        longest = lengths.max(initial=0).item()
        mask = None if (lengths == longest).all() else np.arange(longest) < lengths[:, None]
        size = self.layout.feature_bytes
        files = {shard: self._file(shard) for shard in np.unique(shards).tolist()}
        array = self._buffers.take((len(rows), longest, self.shape[1]), self.layout.dtype)
        memory = memoryview(array.data).cast("B") if array.size else memoryview(b"")
        begins = range(0, array.nbytes, longest * size or 1)
        places = zip(begins, shards.tolist(), (starts * size).tolist(), (lengths * size).tolist(), strict=True)
        for begin, shard, start, num_bytes in places:
            file, position = files[shard]
            if os.preadv(file.fileno(), [memory[begin : begin + num_bytes]], position + start) != num_bytes:
                raise damaged_file(self.layout.path(shard), "it is cut off")
        if mask is None:
            return PaddedFeatures(torch.from_numpy(array), None)
        vectors = array.view(f"V{size}")[..., 0]  # [B, N]; numpy fills whole vectors faster than numbers
        vectors[~mask] = np.zeros((), vectors.dtype)
        return PaddedFeatures(torch.from_numpy(array), torch.from_numpy(mask))

    def _places(self, rows: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each view its shard, the number of features in front of it in the shard, and its own number."""
        shards, rows_in_shard = np.divmod(rows, self.layout.rows_per_shard)
        if self._offsets is None:
            lengths = np.full_like(rows, self.shape[0])
            return shards, (rows_in_shard * self.views + views) * lengths, lengths
        places = rows * self.views + views + shards
        starts = self._offsets[places]
        return shards, starts, self._offsets[places + 1] - starts

    def _check_lengths(self) -> None:
        """Check that every row which is not skipped has features, because attention to none of them is not defined."""
        rows = np.repeat(np.flatnonzero(self.present), self.views)
        lengths = self._places(rows, np.arange(len(rows)) % self.views)[2]
        if not lengths.all():
            shard, place = divmod(rows[lengths == 0][0].item(), self.layout.rows_per_shard)
            raise InputError(
                f"The file {str(self.layout.offsets_path(shard))!r} of the features has no features for its row "
                f"{place}, which is not skipped: delete it, and give the same command of precompute_features.py again."
            )

    def _check_indices(self, rows: np.ndarray, views: np.ndarray) -> None:
        if ((rows < 0) | (rows >= len(self)) | (views < 0) | (views >= self.views)).any():
            raise IndexError(f"There are {len(self)} rows with {self.views} views each, numbered from 0.")
        if not self.present[rows].all():
            row = rows[~self.present[rows]][0].item()
            raise ValueError(f"Row {row} has no features: {self.reasons[row]} Leave out the rows that are not present.")

    def _file(self, shard: int) -> tuple[IO[bytes], int]:
        """Return the open file of a shard, and the position at which its features begin."""
        opened = self._files.get(shard)
        if opened is None:
            if len(self._files) >= MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files)), None)  # closed when no thread reads from it any more
            opened = self.layout.path(shard).open("rb", buffering=0), self._positions[shard]
            self._files[shard] = opened
        return opened

    def _locate(self, shard: int) -> tuple[int, np.ndarray | None]:
        try:
            return self.layout.locate(shard)
        except (OSError, ValueError) as error:
            raise damaged_file(self.layout.path(shard), error) from error


class FeatureRef(NamedTuple):
    """Reference to the precomputed features of one view of a row.

    A data set hands out references instead of tensors, so that the collator reads a whole batch at once.
    """

    features: SplitFeatures
    row: int
    view: int


def read_features(refs: Sequence[FeatureRef]) -> PaddedFeatures:
    """Read the features that references of one split point to, in the dtype of the store.

    Raises:
        InputError: if a shard is damaged.
    """
    features, rows, views = zip(*refs, strict=True)
    return features[0].read(rows, views)


def load_features(path: str | os.PathLike, width: int) -> np.ndarray:
    """Load the features of one row from a file of numpy.

    Args:
        path: the file, with an array `[N, D]`, `[1, N, D]` or `[D]`.
        width: width of the features, D.

    Returns:
        float32 `[N, D]`.

    Raises:
        OSError: if the file cannot be read, or holds something else; the message names it.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        reason = one_line(error, 200).removesuffix(".")
        raise OSError(f"The features {str(path)!r} cannot be read: {reason}.") from error
    return check_features(array, width, repr(str(path)))


def check_features(array: np.ndarray, width: int, name: str) -> np.ndarray:
    """Return the features of one row in float32, `[N, D]`.

    Args:
        array: `[N, D]`, `[1, N, D]` or `[D]`.
        width: width of the features, D.
        name: which features they are, for messages.

    Raises:
        OSError: if the array has another shape, or holds something else than finite numbers.
    """
    features = array[0] if array.ndim == 3 and len(array) == 1 else np.atleast_2d(array)
    if features.dtype.kind not in "iuf" or features.ndim != 2 or 0 in features.shape or features.shape[1] != width:
        raise OSError(
            f"The features {name} are {array.dtype} {list(array.shape)}, and the captioner reads numbers in an "
            f"array [N, {width}]."
        )
    if not np.isfinite(features).all():
        raise OSError(f"The features {name} hold NaN or infinity: compute them again.")
    return features.astype(np.float32)


class BufferPool:
    """Pool of buffers for batches. A buffer is reused when the last tensor that uses it has been freed.

    The operating system fills each page of new memory with zeros. For a large batch, that takes longer than reading it.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an uninitialised array, in a free buffer if there is one."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(size, np.uint8)
        if buffer.nbytes < size:
            buffer = np.empty(size, np.uint8)
        array = buffer[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._give_back, buffer).atexit = False
        return array

    def _give_back(self, buffer: np.ndarray) -> None:
        if len(self._free) < MAX_FREE_BUFFERS:
            self._free.append(buffer)
