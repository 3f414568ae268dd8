"""Opening and shrinking of images in threads beside the model.

Pillow decodes and resizes without holding Python's lock, so threads suffice.
"""

import io
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict

from ..data.images import open_one
from ..images_qformer import MAX_ASPECT_RATIO, MAX_PIXELS, open_image, path_or_content, readable_formats
from .items import Item, TarImage
from .rows import FEATURES_SUFFIX

DRAFT_FACTOR = 2  # a JPEG is decoded at a fraction of its size if both sides stay this many times as large as needed


@dataclass
class LoadedItem:
    """Item whose image is open.

    Args:
        item: the item.
        image: upright RGB image, path of features, or the error for an image that cannot be read.
        content: the file of the image as it was, if it was asked for.
    """

    item: Item
    image: Any
    content: bytes | None = None


class ImageLoader:
    """Opens images, and shrinks them to the size that an image processor needs.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size. Both of its sides then still have at least twice the size that the
    processor needs. This changes pixels slightly. The shrinking after that gives exactly what the processor would have
    computed.

    Args:
        image_processor: image processor of the captioner, or `None` for one that reads features.
        keep_content: also return the files of images as they were.
        num_workers: number of threads.
    """

    def __init__(self, image_processor: Any, keep_content: bool = False, num_workers: int = 2):
        self.image_processor, self.keep_content = image_processor, keep_content
        self.needed_side = side_that_is_needed(image_processor)
        self.resizes = resizes_as_pillow(image_processor)
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="images")

    def submit(self, items: list[Item]) -> list[Future[LoadedItem]]:
        """Start to open items."""
        return [self.threads.submit(self.load, item) for item in items]

    def load(self, item: Item) -> LoadedItem:
        """Open an item. An error becomes its image."""
        try:
            if self.image_processor is None or is_features(item.image):
                return LoadedItem(item, item.image)
            content = content_of(item.image) if self.keep_content else None
            return LoadedItem(item, self._open(item.image, content), content)
        except (OSError, TypeError, ValueError) as error:
            return LoadedItem(item, error)

    def _open(self, image: Any, content: bytes | None) -> Image.Image:
        """Open an image and shrink it."""
        name = name_of(image)
        if content is not None:
            image = content
        elif isinstance(image, Exception):
            raise image
        elif isinstance(image, TarImage):
            image = image.read()
        elif image is None or isinstance(image, Mapping):
            embedded, path = (None, None) if image is None else (image["bytes"], image["path"])
            if embedded is None and (not path or "://" in path or not os.path.isfile(path)):
                return self._shrink(open_one(image))  # type: ignore[arg-type]
            image = Path(str(path)) if embedded is None else embedded
        return self._shrink(self._open_at_size(image, name))

    def _open_at_size(self, image: Any, name: str | None) -> Image.Image:
        """Open an image, at a fraction of its size if it is a large JPEG."""
        if self.needed_side is None:
            return open_image(image, name)
        source = path_or_content(image)
        try:
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=readable_formats())
        except Exception:  # `open_image` says what is wrong
            return open_image(source, name if name is not None or isinstance(source, bytes) else None)
        with opened:
            longer, shorter = max(opened.size), min(opened.size)
            if longer * shorter <= MAX_PIXELS and longer <= MAX_ASPECT_RATIO * shorter:
                opened.draft(None, (DRAFT_FACTOR * self.needed_side,) * 2)  # type: ignore[arg-type]
            return open_image(opened, name if name is not None else image_name(image))

    def _shrink(self, image: Image.Image) -> Image.Image:
        """Shrink an image as the processor would, so that the processor changes nothing."""
        processor = self.image_processor
        if not self.resizes or self.needed_side is None or min(image.size) <= self.needed_side:
            return image
        pixels = np.moveaxis(np.array(image), -1, 0)
        size = processor.size if isinstance(processor.size, SizeDict) else SizeDict(**processor.size)
        return Image.fromarray(np.moveaxis(processor.resize(pixels, size=size, resample=processor.resample), 0, -1))


def side_that_is_needed(image_processor: Any) -> int | None:
    """Return the side to which an image processor resizes images, or `None` if it depends on the image."""
    size = getattr(image_processor, "size", None)
    if size is None or not getattr(image_processor, "do_resize", False):
        return None
    given = {name: value for name, value in dict(size).items() if value}
    if set(given) not in ({"height", "width"}, {"shortest_edge"}):
        return None
    return max(given.values())


def resizes_as_pillow(image_processor: Any) -> bool:
    """Return whether an image processor first resizes an image, with Pillow, and to a size that stays the same."""
    kind = type(image_processor)
    return (
        isinstance(image_processor, PilBackend)
        and kind.resize is PilBackend.resize
        and kind._preprocess is PilBackend._preprocess
        and kind.process_image is PilBackend.process_image
    )


def is_features(image: Any) -> bool:
    """Return whether an image is a file of features."""
    return isinstance(image, str) and image.lower().endswith(FEATURES_SUFFIX)


def name_of(image: Any) -> str | None:
    """Return the name of an image for errors, or `None` for the name that its path gives."""
    if isinstance(image, TarImage):
        return image.name
    if isinstance(image, Mapping) and image.get("path"):
        return os.path.basename(image["path"]) if image.get("bytes") is not None else image["path"]
    return image_name(image)


def image_name(image: Any) -> str | None:
    """Return a path or URL as text."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else None


def content_of(image: Any) -> bytes | None:
    """Return the file of an image as it is, or `None` where it can only be opened.

    Raises:
        OSError: if it cannot be read.
    """
    if isinstance(image, Exception):
        raise image
    if isinstance(image, TarImage):
        return image.read()
    if isinstance(image, Mapping):
        if image["bytes"] is not None:
            return image["bytes"]
        if not image["path"] or "://" in image["path"]:
            return None
        image = Path(image["path"]) if os.path.isfile(image["path"]) else image["path"]
    source = path_or_content(image)
    return source if isinstance(source, bytes) else Path(source).read_bytes()
