"""Images of a data set: undecoded cells, and safe opening."""

import hashlib
import os
import reprlib
from pathlib import Path
from typing import Any, TypedDict

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..common.errors import InputError, one_line
from ..images_qformer import MAX_BYTES, embedded_content, open_image, shown
from .image_paths import ImageFolder
from .names import ID_NAMES


class ImageCell(TypedDict):
    """Undecoded image: the bytes or the path of a file."""

    bytes: bytes | None
    path: str | None


def undecoded_images(rows: datasets.Dataset, column: str, option: str) -> datasets.Dataset:
    """Return a data set with only the image column, undecoded.

    `datasets` decodes whole batches and fails on the first damaged image. Undecoded images are opened one by one, so
    that a damaged one can be skipped. A list of one image counts as that image, and any other list as an empty cell.

    Args:
        rows: the data set.
        column: name of its column of images or paths.
        option: the command-line option that chooses the column, for the error message.

    Raises:
        InputError: if the column cannot hold images.
    """
    feature = rows.features[column]
    images = rows.select_columns(column)
    try:
        if isinstance(feature, datasets.List | datasets.LargeList):
            images = only_items(images, column)
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, dict) and not {"bytes", "path"} & inner.keys():
            raise TypeError("`datasets` would read it as a column without images")
        if column in ID_NAMES and isinstance(inner, datasets.Value) and "int" in inner.dtype:  # names of files
            images = images.cast_column(column, datasets.Value("string"))
        return images.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"The column {column!r} holds {one_line(feature, 200)}, not images or paths. Choose another column with "
            f"{option}."
        ) from error


def only_items(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return the only item of each list in a column, and `None` for a list of no item or several.

    Raises:
        TypeError: if no list has exactly one item.
    """
    parts = []
    for chunk in rows.flatten_indices().data.column(column).chunks:
        counts = pc.fill_null(pc.list_value_length(chunk), 0)
        items = chunk.flatten()
        if not pc.all(pc.equal(counts, 1)).as_py():  # otherwise nothing is copied
            ends = pc.cumulative_sum(counts)
            items = items.take(pc.if_else(pc.equal(counts, 1), pc.subtract(ends, 1), None))
        parts.append(items)
    if all(part.null_count == len(part) for part in parts):
        raise TypeError("no list holds exactly one image")
    return datasets.Dataset(pa.table({column: pa.chunked_array(parts)}))


def image_cell(value: Any) -> ImageCell | None:
    """Return a value of an untyped stream (a dict, bytes, a text, or a list of one of these) as an undecoded cell.

    Raises:
        OSError: if the value does not hold an image. The message names its type.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return image_cell(value[0]) if len(value) == 1 else None
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        content, path = value.get("bytes"), value.get("path")
        if isinstance(content, str | bytes | None) and isinstance(path, str | None):
            return {"bytes": content.encode() if isinstance(content, str) else content, "path": path}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    if isinstance(value, str):
        return {"bytes": None, "path": value}
    if value is None:
        return None
    keys = f" with the keys {reprlib.repr(list(value))}" if isinstance(value, dict) else ""
    raise OSError(f"The image column of the row holds a value of type {type(value).__name__!r}{keys}, not an image.")


def file_of_image(value: Any) -> str | None:
    """Return the path of an undecoded image, or `None` for an image that the data set itself holds.

    Args:
        value: a cell, or a value of an untyped stream.
    """
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) and embedded_content(path) is None else None


def open_cell(cell: ImageCell | None, folder: ImageFolder | None = None) -> Image.Image:
    """Open an undecoded image as upright RGB.

    Args:
        cell: the image. Its bytes are used if present, otherwise its path. The path may also be a `data:` URL or base64
            text, which hold the image themselves.
        folder: folder where the path starts and that it must not leave. By default any path is allowed.

    Raises:
        OSError: if the cell is empty or the image cannot be read. The message names the image.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise OSError("The row has no image, or several.")
    content, path = cell["bytes"], cell["path"]
    if content is not None:
        return open_image(content, os.path.basename(path or ""))
    assert path is not None
    if (embedded := embedded_content(path)) is not None:
        return open_image(embedded, path)
    member, _, archive = path.partition("::")
    if path.startswith("zip://") and archive and "::" not in archive:  # a stream of images in an archive
        path = f"{member}::{archive if folder is None else folder.locate(archive)}"
    elif folder is not None or not path.startswith("hf://"):
        return open_image(Path(path) if folder is None else folder.locate(path))  # a `Path` is never opened as a URL
    try:
        with fsspec.open(path) as file:
            content = file.read(MAX_BYTES)
    except Exception as error:  # each archive format raises its own errors
        raise OSError(f"The image {shown(path)} cannot be read ({one_line(error, 200)}).") from error
    return open_image(content, os.path.basename(member))


def image_keys(images: datasets.Dataset, column: str) -> np.ndarray:
    """Return keys that identify the images of a data set: `[rows]` of uint64.

    A key is a hash of the image's file name and, if the data set stores the image, of its size. For an image in base64
    it is a hash of the text. Keys stay the same when a folder moves, and change when rows change or are reordered.

    Args:
        images: undecoded images, as [`undecoded_images`] returns them.
        column: name of the column that holds them.
    """
    keys = []
    for batch in images.select_columns(column).with_format("arrow").iter(1000):
        cells = pa.chunked_array(batch.column(column)).combine_chunks()
        sizes = pc.binary_length(cells.field("bytes")).to_pylist()
        for path, size in zip(cells.field("path").to_pylist(), sizes, strict=True):
            file = file_of_image(path)
            text = f"{path or '' if file is None else os.path.basename(file)}|{size}".encode()
            keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return np.array(keys, dtype=np.uint64)
