"""TODO."""

import os
import re
from pathlib import Path

import fsspec
from PIL import Image

from ..common.errors import InputError
from ..processing_qformer import MAX_BYTES, open_image
from .readers import Rows, find_files


def open_cell(cell: dict | None, folder: Path | None = None) -> Image.Image:
    """Open an image as an undecoded column holds it: `{"bytes": ..., "path": ...}`, of which one is enough.

    Args:
        cell: the image.
        folder: its path must lie inside this folder; by default it may lie anywhere.

    Raises:
        OSError: if there is none or it cannot be read; the message names it where it has a name.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise OSError("The row has no image.")
    content, path = cell["bytes"], cell["path"]
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):  # of a stream without a type
        raise OSError("The row has no image, but something else.")
    if content is not None:
        return open_image(content, os.path.basename(path or ""))
    inner, _, archive = path.partition("::")
    if path.startswith("zip://") and archive and "::" not in archive:  # a stream of images in an archive
        path = f"{inner}::{archive if folder is None else locate(archive, folder)}"
    elif folder is not None or not path.startswith("hf://"):
        return open_image(Path(path) if folder is None else locate(path, folder))  # a path, and never an address
    try:
        with fsspec.open(path) as file:
            content = file.read(MAX_BYTES)
    except Exception as error:  # each kind of archive has errors of its own
        raise OSError(f"The image {path[:200]!r} cannot be read ({error}).") from error
    return open_image(content, os.path.basename(path.partition("::")[0]))


def folder_of_images(name: str, rows: Rows, image_folder: str | os.PathLike | None = None) -> Path | None:
    """The folder inside which the paths of an image column lie.

    Args:
        name, rows: a data set, and rows of it as they were loaded.
        image_folder: the folder, if it is another than that of the files.

    Returns:
        The folder, or `None` where `datasets` has found the images by itself (on the Hub, or among scenes).

    Raises:
        InputError: if the folder is not there.
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
    """The file that a path in a row means: one inside the folder of images, whoever wrote the row.

    Raises:
        OSError: for an address, or a path that leads out of the folder, be it through a symbolic link.
    """
    if "\0" in path or re.match(r"[a-z][a-z0-9+.-]*://|data:", path, re.IGNORECASE):
        raise OSError(f"{path[:200]!r} is no path, and images are read from files: download it first.")
    root = folder.resolve()
    try:
        found = (folder / path).resolve()
    except (ValueError, RuntimeError) as error:  # half a character; symbolic links that lead to each other
        raise OSError(f"{path[:200]!r} is no path ({error}).") from error
    inside = [root]
    if root.parent.name == "snapshots":  # in the Hub's cache files are links to blobs
        inside.append(root.parent.parent / "blobs")
    if not any(map(found.is_relative_to, inside)):
        raise OSError(
            f"{path[:200]!r} leads out of the folder of images {str(folder)!r}; --image_folder names another one."
        )
    return found
