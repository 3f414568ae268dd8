"""Paths of images in rows: where they start, where they may lead, and which file they name."""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from ..common.errors import InputError
from ..images_qformer import MAX_PATH
from .columns import Rows
from .names import IMAGE_SUFFIXES
from .row_files import find_files

MAX_SHOWN = 150  # characters of a path within a message


@dataclass(frozen=True)
class ImageFolder:
    """Folder where the paths of a data set's images start, and the folders that they must not leave.

    Rows may come from untrusted sources, so a path that leads elsewhere is refused.

    Args:
        path: folder where relative paths start.
        rows_folder: folder of the files of rows. A relative path that leads out of `path` starts there instead.
        allowed: further folders that paths may lead into.

    Example:

    ```python
    >>> folder = ImageFolder(Path("photos"), allowed=(Path("/mnt/photos"),))
    >>> folder.locate(r"2024\\dog")  # doctest: +SKIP
    PosixPath('/home/me/photos/2024/dog.jpg')
    ```
    """

    path: Path
    rows_folder: Path | None = None
    allowed: tuple[Path, ...] = ()
    _names: dict[Path, "FileNames"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def locate(self, path: str) -> Path:
        """Return the file that a path in a row names.

        A path that does not exist as written may differ from the only file that fits in these ways: backslashes
        instead of slashes, percent-encoding, Unicode normalization, upper or lower case, a missing suffix, and spaces
        around it.

        Raises:
            OSError: for a URL, and for a path that leads out of the allowed folders, also through a symbolic link. Also
                for a path that no file or several files fit.
        """
        shown = repr(path[:MAX_SHOWN])
        if re.match(r"[a-z][a-z0-9+.-]*://|data:", path, re.IGNORECASE):
            raise OSError(
                f"{shown} is not the path of a file but a URL, and images are not downloaded: download it first."
            )
        if len(path) > MAX_PATH:
            raise OSError(f"{shown}... is not the path of a file: it has {len(path):,} characters.")
        outside = None
        for wanted in self._candidates(path):
            if not self._allows(wanted):
                outside = outside or wanted
            elif (found := self._fitting(wanted)) is not None:
                if self._allows(resolved := found.resolve()):
                    return resolved
                outside = outside or resolved
        if outside is not None and (outside.exists() or ".." in path):
            raise OSError(
                f"{shown} leads out of the folder of images {str(self.path)[:MAX_SHOWN]!r}: allow its folder with "
                f"--allowed_image_folders {str(outside.parent)[:MAX_SHOWN]!r}, or name another with --image_folder."
            )
        raise FileNotFoundError(f"There is no image file {shown} in {str(self.path)[:MAX_SHOWN]!r} (--image_folder).")

    def _candidates(self, path: str) -> Iterator[Path]:
        """Yield the paths that a text may mean, most literal first, without symbolic links.

        Raises:
            OSError: if the text cannot be a path.
        """
        slashed = path.strip().replace("\\", "/")
        for text in dict.fromkeys((path, slashed, unquote(slashed))):
            for start in (self.path, self.rows_folder):
                try:
                    if start is not None:
                        yield (start / text).resolve()
                except (OSError, ValueError, RuntimeError) as error:  # a zero byte, or circular symbolic links
                    raise OSError(f"{path[:MAX_SHOWN]!r} is not the path of a file ({error}).") from error

    def _allows(self, resolved: Path) -> bool:
        """Return whether a path without symbolic links lies in one of the allowed folders."""
        return any(map(resolved.is_relative_to, self._roots))

    @cached_property
    def _roots(self) -> list[Path]:
        roots = [folder.resolve() for folder in (self.path, *self.allowed)]
        # Files in the Hub cache are links to blobs.
        return roots + [root.parent.parent / "blobs" for root in roots if root.parent.name == "snapshots"]

    def _fitting(self, path: Path) -> Path | None:
        """Return the file or folder, or the only one whose name fits.

        Raises:
            OSError: if several fit.
        """
        missing: list[str] = []
        while not os.path.exists(path):
            missing.append(path.name)
            path = path.parent
        for name in reversed(missing):
            if not path.is_dir():
                return None
            if path not in self._names:
                self._names[path] = FileNames(os.listdir(path))
            names = self._names[path].fitting(name)
            if len(names) > 1:
                several = ", ".join(map(repr, names[:3]))[:MAX_SHOWN]
                raise OSError(
                    f"The path {name[:MAX_SHOWN]!r} fits several files, {several}: write the whole name of one."
                )
            if not names:
                return None
            path /= names[0]
        return path


class FileNames:
    """Names of the files in a folder, found by names that are written in another way.

    Args:
        names: the names.
    """

    def __init__(self, names: Sequence[str]):
        self.by_name: dict[str, list[str]] = defaultdict(list)
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            self.by_name[folded(name)].append(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                self.by_stem[folded(stem)].append(name)

    def fitting(self, wanted: str) -> list[str]:
        """Return the names that fit best: the same letters, then other case, then with a suffix of images."""
        same_letters = unicodedata.normalize("NFC", wanted)
        any_case = self.by_name.get(folded(wanted), [])
        with_suffix = self.by_stem.get(folded(wanted), [])
        return (
            [name for name in any_case if unicodedata.normalize("NFC", name) == same_letters]
            or any_case
            or [name for name in with_suffix if unicodedata.normalize("NFC", name).startswith(same_letters)]
            or with_suffix
        )


def folded(name: str) -> str:
    """Return a name without differences of case and Unicode normalization."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folder_of_images(
    name: str,
    rows: Rows,
    image_folder: str | os.PathLike | None = None,
    allowed_image_folders: Sequence[str | os.PathLike] | None = None,
) -> ImageFolder | None:
    """Return where the paths of an image column start, and the folders that they must not leave.

    Args:
        name: name of the data set, as given to [`load_rows`].
        rows: rows of the data set, as [`load_rows`] returned them.
        image_folder: folder where relative paths start. By default it is the folder of the files of rows.
        allowed_image_folders: further folders that paths may lead into.

    Returns:
        The folder, or `None` if `datasets` has resolved the paths itself (data sets on the Hub) or there are no paths
        (drawn scenes).

    Raises:
        InputError: if a folder does not exist.
    """
    for folder in (image_folder, *(allowed_image_folders or ())):
        if folder is not None and not os.path.isdir(folder):
            option = "--image_folder" if folder is image_folder else "--allowed_image_folders"
            raise InputError(f"There is no folder of images {str(folder)[:MAX_SHOWN]!r} ({option}).")
    rows_folder = None if name == "scenes" else folder_of_rows(name, rows)
    start = rows_folder if image_folder is None else Path(image_folder)
    return None if start is None else ImageFolder(start, rows_folder, tuple(map(Path, allowed_image_folders or ())))


def folder_of_rows(name: str, rows: Rows) -> Path | None:
    """Return the folder of the files of rows, or `None` if `datasets` has resolved the paths in them."""
    if os.path.isdir(name):
        return Path(name)
    if rows.info.builder_name == "imagefolder":
        return None
    files = [os.path.abspath(file) for file in find_files(name) if "://" not in file]
    return Path(os.path.commonpath([os.path.dirname(file) for file in files]) if files else ".")
