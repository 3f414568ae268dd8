"""Images of a data set: undecoded cells, the folder that contains their files, and safe opening."""

import hashlib
import os
import re
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
from .columns import Rows
from .row_files import find_files


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


def open_cell(cell: ImageCell | None, folder: Path | None = None) -> Image.Image:
    """Open an undecoded image as upright RGB.

    Args:
        cell: the image. Its bytes are used if present, otherwise its path.
        folder: folder that must contain the path. By default any path is allowed.

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
        path = f"{member}::{archive if folder is None else locate(archive, folder)}"
    elif folder is not None or not path.startswith("hf://"):
        return open_image(Path(path) if folder is None else locate(path, folder))  # a `Path` is never opened as a URL
    try:
        with fsspec.open(path) as file:
            content = file.read(MAX_BYTES)
    except Exception as error:  # each archive format raises its own errors
        raise OSError(f"The image {path[:200]!r} cannot be read ({error}).") from error
    return open_image(content, os.path.basename(member))


def folder_of_images(name: str, rows: Rows, image_folder: str | os.PathLike | None = None) -> Path | None:
    """Return the folder that must contain the paths of an image column.

    Args:
        name: name of the data set, as given to [`load_rows`].
        rows: rows of the data set, as [`load_rows`] returned them.
        image_folder: the folder, if it is not the folder of the files of rows.

    Returns:
        The folder, or `None` if `datasets` has resolved the paths itself (data sets on the Hub) or there are no paths
        (drawn scenes).

    Raises:
        InputError: if the folder does not exist.
    """
    if image_folder is not None:
        if not os.path.isdir(image_folder):
            raise InputError(f"There is no folder of images {str(image_folder)!r} (--image_folder).")
        return Path(image_folder)
    if name == "scenes":
        return None
    if os.path.isdir(name):
        return Path(name)
    if rows.info.builder_name == "imagefolder":
        return None
    files = [os.path.abspath(file) for file in find_files(name) if "://" not in file]
    return Path(os.path.commonpath([os.path.dirname(file) for file in files]) if files else ".")


def locate(path: str, folder: Path) -> Path:
    """Resolve a path from a row inside the folder of images. Rows may come from untrusted sources.

    Raises:
        OSError: for a URL, or for a path outside the folder, including through a symbolic link.
    """
    if "\0" in path or re.match(r"[a-z][a-z0-9+.-]*://|data:", path, re.IGNORECASE):
        raise OSError(f"{path[:200]!r} is not the path of a file: download the image first.")
    root = folder.resolve()
    try:
        resolved = (folder / path).resolve()
    except (ValueError, RuntimeError) as error:  # an unpaired surrogate, or circular symbolic links
        raise OSError(f"{path[:200]!r} is not a valid path ({error}).") from error
    allowed = [root]
    if root.parent.name == "snapshots":  # files in the Hub cache are links to blobs
        allowed.append(root.parent.parent / "blobs")
    if not any(map(resolved.is_relative_to, allowed)):
        raise OSError(
            f"{path[:200]!r} leads out of the folder of images {str(folder)!r}; --image_folder names another one."
        )
    return resolved


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
