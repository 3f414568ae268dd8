"""Images and videos of a data set: undecoded cells, and safe opening. A video is a list of images, its frames."""

import hashlib
import os
import reprlib
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import table_cast
from PIL import Image

from ..common.errors import InputError, one_line
from ..images_qformer import MAX_BYTES, embedded_content, open_image, sample_frames, shown
from .image_paths import ImageFolder
from .names import ID_NAMES


class ImageCell(TypedDict):
    """Undecoded image: the bytes or the path of a file."""

    bytes: bytes | None
    path: str | None


Cell: TypeAlias = ImageCell | list[ImageCell | None] | None
Picture: TypeAlias = Image.Image | list[Image.Image]


def undecoded_images(rows: datasets.Dataset, column: str, option: str) -> datasets.Dataset:
    """Return a data set with only the image column, undecoded.

    `datasets` decodes whole batches and fails on the first damaged image. Undecoded images are opened one by one, so
    that a damaged one can be skipped. If all lists of a column have one image, they count as that image. Otherwise the
    cells are lists, the frames of videos.

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
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, dict) and not {"bytes", "path"} & inner.keys():
            raise TypeError("`datasets` would read it as a column without images")
        if inner is not feature:
            if is_array(inner):
                raise TypeError("an array in a cell would be read as a list of its rows")
            return lists_of_images(images, column)
        if column in ID_NAMES and isinstance(inner, datasets.Value) and "int" in inner.dtype:  # names of files
            images = images.cast_column(column, datasets.Value("string"))
        return images.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"The column {column!r} holds {one_line(feature, 200)}, not images or paths. Choose another column with "
            f"{option}."
        ) from error


def is_array(feature: Any) -> bool:
    """Return True for nested lists of two dimensions, `[height, width]`."""
    return hasattr(feature, "feature") and isinstance(getattr(feature.feature, "feature", None), datasets.Value)


def lists_of_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Return a column of lists as undecoded images if each list has exactly one, otherwise as lists of these.

    Raises:
        TypeError: if no list holds an image.
    """
    table = rows.flatten_indices().data.select([column])
    lists = datasets.Features({column: datasets.List(datasets.Image(decode=False))})
    cells = table_cast(pa.table({column: table.column(column)}), lists.arrow_schema).column(column)
    counts = pc.fill_null(pc.list_value_length(cells), 0)
    if pc.sum(counts).as_py() in (None, 0):
        raise TypeError("no list holds an image")
    if pc.all(pc.equal(counts, 1)).as_py():
        cells, lists = pc.list_flatten(cells), datasets.Features({column: lists[column].feature})
    return datasets.Dataset(pa.table({column: cells}), info=datasets.DatasetInfo(features=lists))


def image_cell(value: Any) -> Cell:
    """Return a value of an untyped stream (a dict, bytes, a text, or a list of these) as an undecoded cell.

    Raises:
        OSError: if the value does not hold an image. The message names its type.
    """
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        return [frame_cell(item) for item in value]
    return frame_cell(value)


def frame_cell(value: Any) -> ImageCell | None:
    """Return a dict, bytes or a text as the undecoded cell of one image.

    Raises:
        OSError: if the value does not hold an image. The message names its type.
    """
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


def frames_of(cell: Cell) -> list[ImageCell | None]:
    """Return the frames of an undecoded video, or an undecoded image as the only one."""
    return cell if isinstance(cell, list) else [cell]


def id_of_image(cell: ImageCell | None) -> tuple[str | None, int] | None:
    """Return what identifies an undecoded image: its path and a hash of its bytes."""
    return None if cell is None else (cell["path"], hash(cell["bytes"]))


def file_of_image(value: Any) -> str | None:
    """Return the path of an undecoded image, or `None` for an image that the data set itself holds.

    The path of a video is that of its first frame.

    Args:
        value: a cell, or a value of an untyped stream.
    """
    value = value[0] if isinstance(value, list) and value else value
    path = value.get("path") if isinstance(value, dict) else value
    return path if isinstance(path, str) and embedded_content(path) is None else None


def open_cell(cell: Cell, folder: ImageFolder | None = None, num_frames: int = 1) -> Picture:
    """Open an undecoded image as upright RGB, or the frames of a video.

    Args:
        cell: the image, or a list of images. A list of one is that image.
        folder: folder where paths start and that they must not leave. By default any path is allowed.
        num_frames: number of frames to open of a video. Longer videos are sampled evenly. With 1, videos are refused.

    Raises:
        OSError: if the cell is empty, or an image cannot be read. The message names the image. Also for a video, if
            only images are read.
    """
    frames = frames_of(cell)
    if not frames:
        raise OSError("The row has no image.")
    if len(frames) == 1:
        return open_one(frames[0], folder)
    if num_frames == 1:
        raise OSError(
            f"The row has {len(frames)} images, and a captioner reads one unless it is trained on videos "
            "(--num_frames)."
        )
    return [open_one(frame, folder) for frame in sample_frames(frames, num_frames)]


def open_image_cell(cell: Cell, folder: ImageFolder | None = None) -> Image.Image:
    """Open an undecoded image as [`open_cell`] does, for features that are computed of images only.

    Raises:
        OSError: if the cell is empty, the image cannot be read, or the cell holds a video.
    """
    frames = frames_of(cell)
    if len(frames) > 1:
        raise OSError(f"The row has {len(frames)} images, and features of videos cannot be precomputed: train on them.")
    return open_one(frames[0] if frames else None, folder)


def middle_frame(picture: Picture) -> Image.Image:
    """Return the middle frame of a video, to show it. An image is returned as it is."""
    return picture[len(picture) // 2] if isinstance(picture, list) else picture


def open_one(cell: ImageCell | None, folder: ImageFolder | None = None) -> Image.Image:
    """Open one undecoded image as upright RGB.

    Args:
        cell: the image. Its bytes are used if present, otherwise its path. The path may also be a `data:` URL or base64
            text, which hold the image themselves.
        folder: folder where the path starts and that it must not leave. By default any path is allowed.

    Raises:
        OSError: if the cell is empty or the image cannot be read. The message names the image.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise OSError("The row has no image.")
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
    """Return keys that identify the images or videos of a data set: `[rows]` of uint64.

    A key is a hash of the image's file name and, if the data set stores the image, of its size. For an image in base64
    it is a hash of the text, and for a video a hash of all its frames. Keys stay the same when a folder moves, and
    change when rows change or are reordered.

    Args:
        images: undecoded images, as [`undecoded_images`] returns them.
        column: name of the column that holds them.
    """
    keys = []
    for batch in images.select_columns(column).with_format("arrow").iter(1000):
        cells = pa.chunked_array(batch.column(column)).combine_chunks()
        counts = [1] * len(cells)
        if not pa.types.is_struct(cells.type):  # lists
            counts = pc.fill_null(pc.list_value_length(cells), 0).to_pylist()
            cells = pc.list_flatten(cells)
        sizes = pc.binary_length(cells.field("bytes")).to_pylist()
        texts = map(text_of_key, cells.field("path").to_pylist(), sizes)
        for count in counts:
            text = "\n".join(islice(texts, count)).encode()
            keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return np.array(keys, dtype=np.uint64)


def text_of_key(path: str | None, size: int | None) -> str:
    """Return what identifies an image: its file name or its text in base64, and its size if the data set stores it."""
    file = file_of_image(path)
    return f"{path or '' if file is None else os.path.basename(file)}|{size}"
