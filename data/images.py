"""Images of a data set: undecoded cells, and safe opening."""

import hashlib
import os
from pathlib import Path
from typing import Any, TypedDict

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..common.errors import InputError
from ..processing_qformer import MAX_BYTES, open_image
from .image_paths import ImageFolder


class ImageCell(TypedDict):
    """Undecoded image: the bytes or the path of a file."""

    bytes: bytes | None
    path: str | None


def undecoded_images(rows: datasets.Dataset, column: str, option: str) -> datasets.Dataset:
    """Return a data set with only the image column, undecoded.

    `datasets` decodes whole batches and fails on the first damaged image. Undecoded images are opened one by one, so
    that a damaged one can be skipped.

    Args:
        rows: the data set.
        column: name of its column of images or paths.
        option: the command-line option that chooses the column, for the error message.

    Raises:
        InputError: if the column cannot hold images.
    """
    try:
        return rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"The column {column!r} holds {rows.features[column]}, not images or paths. Choose another column with "
            f"{option}."
        ) from error


def image_cell(value: Any) -> ImageCell | None:
    """Return a value of an untyped stream (a dict, bytes or a path) as an undecoded cell."""
    if isinstance(value, dict):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return None if value is None else {"bytes": None, "path": str(value)}


def open_cell(cell: ImageCell | None, folder: ImageFolder | None = None) -> Image.Image:
    """Open an undecoded image as upright RGB.

    Args:
        cell: the image. Its bytes are used if present, otherwise its path.
        folder: folder where the path starts and that it must not leave. By default any path is allowed.

    Raises:
        OSError: if the cell is empty or the image cannot be read. The message names the image.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise OSError("The row has no image.")
    content, path = cell["bytes"], cell["path"]
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):  # from a stream without a schema
        raise OSError("The image column of the row does not hold an image.")
    if content is not None:
        return open_image(content, os.path.basename(path or ""))
    assert path is not None
    member, _, archive = path.partition("::")
    if path.startswith("zip://") and archive and "::" not in archive:  # a stream of images in an archive
        path = f"{member}::{archive if folder is None else folder.locate(archive)}"
    elif folder is not None or not path.startswith("hf://"):
        return open_image(Path(path) if folder is None else folder.locate(path))  # a `Path` is never opened as a URL
    try:
        with fsspec.open(path) as file:
            content = file.read(MAX_BYTES)
    except Exception as error:  # each archive format raises its own errors
        raise OSError(f"The image {path[:200]!r} cannot be read ({error}).") from error
    return open_image(content, os.path.basename(member))


def image_keys(images: datasets.Dataset, column: str) -> np.ndarray:
    """Return keys that identify the images of a data set: `[rows]` of uint64.

    A key is a hash of the image's file name and, if the data set stores the image, of its size. Keys stay the same when
    a folder moves, and change when rows change or are reordered.

    Args:
        images: undecoded images, as [`undecoded_images`] returns them.
        column: name of the column that holds them.
    """
    keys = []
    for batch in images.select_columns(column).with_format("arrow").iter(1000):
        cells = pa.chunked_array(batch.column(column)).combine_chunks()
        sizes = pc.binary_length(cells.field("bytes")).to_pylist()
        for path, size in zip(cells.field("path").to_pylist(), sizes, strict=True):
            text = f"{os.path.basename(path or '')}|{size}".encode()
            keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return np.array(keys, dtype=np.uint64)
