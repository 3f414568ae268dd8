"""Captions as text files beside the images: `dog.txt` for `dog.jpg`."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from .items import Item, KeySet
from .outputs import Output, OutputRow

EXISTING = ("skip", "overwrite", "append", "prepend")


class Sidecars(Output):
    """Text files beside the images, one caption on each line, in UTF-8.

    If two images differ only in their suffix, the text of the second one is `dog.png.txt`. `train` reads both.

    Args:
        suffix: suffix of the texts, such as ".txt".
        existing: what to do with an image that has a text: "skip" it, "overwrite" the text, or "append" or "prepend"
            the caption.
        separator: text between an existing text and the caption.
    """

    is_file = False

    def __init__(self, suffix: str, existing: str = "skip", separator: str = " "):
        self.suffix, self.existing, self.separator = suffix, existing, separator
        self._named = KeySet()

    def named(self, item: Item) -> Item:
        """Return an item with the path of its text.

        Raises:
            InputError: if the image is not a file.
        """
        if isinstance(item.image, Exception):
            return item
        if item.path is None:
            raise InputError(
                f"--sidecar writes texts beside files of images, and {item.key[-150:]!r} is not one: use --output."
            )
        sidecar = os.path.splitext(item.path)[0] + self.suffix
        if not self._named.add(sidecar):
            sidecar = item.path + self.suffix
        return dataclasses.replace(item, sidecar=sidecar)

    def is_captioned(self, item: Item) -> bool:
        """Return whether an image keeps the text that it has. An empty text does not count."""
        return self.existing == "skip" and has_text(item)

    def resume(self, record: Any | None) -> None:
        """Do nothing, because each text is a file of its own."""

    def prepare(self, rows: list[OutputRow]) -> Any:
        return [[row.item.sidecar, self._text(row), digest_of(row.item.sidecar)] for row in rows]

    def apply(self, record: Any) -> None:
        """Write the texts of a batch. A text that is no longer as it was before the batch is left alone."""
        for path, text, before in record:
            unfinished = Path(f"{path}.tmp")  # the same name after a kill
            if digest_of(path) == before:
                unfinished.write_bytes(text.encode("utf-8", "surrogateescape"))
                unfinished.replace(path)
            else:
                unfinished.unlink(missing_ok=True)

    def _text(self, output: OutputRow) -> str:
        """Return the content of a text file. Bytes of an existing text that are not UTF-8 stay as they are."""
        text = "\n".join(output.row.captions)
        path = Path(str(output.item.sidecar))
        if self.existing in ("append", "prepend") and path.is_file():
            old = path.read_bytes().decode("utf-8-sig", "surrogateescape").strip()
            parts = [old, text] if self.existing == "append" else [text, old]
            text = self.separator.join(filter(None, parts))
        return f"{text}\n"


def has_text(item: Item) -> bool:
    """Return whether the text of an image is there and not empty."""
    return item.sidecar is not None and os.path.isfile(item.sidecar) and os.path.getsize(item.sidecar) > 0


def digest_of(path: str | None) -> str | None:
    """Return a hash of a file, or `None` for a file that does not exist."""
    try:
        return hashlib.blake2b(Path(str(path)).read_bytes(), digest_size=16).hexdigest()
    except FileNotFoundError:
        return None
