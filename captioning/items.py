"""Images to caption, as items that can be sent to another process and opened there."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

ID_BYTES = 8
MIN_MERGED = 4096  # new keys that are kept in a Python set before they are merged into the sorted array


@dataclass(frozen=True)
class TarImage:
    """Image inside an uncompressed tar.

    Args:
        tar: path of the tar.
        offset: place of the first byte of the image.
        size: number of its bytes.
        name: its name in the tar.
    """

    tar: str
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Return the content of the image.

        Raises:
            OSError: if the tar cannot be read, or ends before the image does.
        """
        with open(self.tar, "rb") as file:
            content = os.pread(file.fileno(), self.size, self.offset)
        if len(content) < self.size:
            raise OSError(f"The image {self.name!r} cannot be read: the tar {self.tar!r} was cut off.")
        return content


@dataclass(frozen=True)
class Item:
    """Image, or features, to caption.

    Args:
        key: text that identifies the item among all items of a run, also after a restart.
        image_id: id of the image in files of captions.
        image: path, URL, bytes, [`TarImage`], dict of `datasets`, or the error for an image that cannot be found.
        path: file on disk, or `None` for an image that has no file of its own.
        sidecar: text file that belongs to the image, if one is written.
    """

    key: str
    image_id: int | str
    image: Any
    path: str | None = None
    sidecar: str | None = None


class KeySet:
    """Set of texts that needs about 9 bytes for each of them, because it stores hashes of 64 bits.

    Two of ten million texts have the same hash with a probability of 3e-6.

    Example:

    ```python
    >>> keys = KeySet()
    >>> keys.add("dog.jpg"), keys.add("dog.jpg")
    (True, False)
    ```
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._new: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def __contains__(self, text: str) -> bool:
        return self._has(hash_of(text))

    def add(self, text: str) -> bool:
        """Add a text, and return whether it was new."""
        number = hash_of(text)
        if self._has(number):
            return False
        self._new.add(number)
        if len(self._new) >= max(MIN_MERGED, len(self._sorted) // 8):
            self.update(())
        return True

    def update(self, hashes: Iterable[np.ndarray]) -> None:
        """Add hashes.

        Args:
            hashes: arrays of uint64.
        """
        new = np.fromiter(self._new, np.uint64, len(self._new))
        self._sorted = np.unique(np.concatenate([self._sorted, new, *hashes]))
        self._new = set()

    def _has(self, number: int) -> bool:
        if number in self._new:
            return True
        place = int(np.searchsorted(self._sorted, np.uint64(number)))
        return place < len(self._sorted) and int(self._sorted[place]) == number


def hash_of(text: str, seed: int = 0) -> int:
    """Return a hash of 64 bits that is the same in every process."""
    content = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(
        hashlib.blake2b(content, digest_size=ID_BYTES, salt=seed.to_bytes(8, "little")).digest(), "little"
    )


def hashes_of(items: Iterable[Item]) -> np.ndarray:
    """Return the hashes of the keys of items: `[items]` of uint64."""
    return np.array([hash_of(item.key) for item in items], np.uint64)
