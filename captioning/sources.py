"""Inputs of `qformer-captioner caption`: each class yields the images of one kind of input, one by one.

To add a kind of input, write a subclass of [`Source`] and name it in [`sources_of`].
"""

import glob
import os
import sys
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import datasets

from ..common.errors import InputError, one_line
from ..data.caption_forms import is_id
from ..data.columns import column_names, image_column_of, missing_column, nested_value, with_nested_columns
from ..data.image_paths import ImageFolder, folder_of_images
from ..data.images import Cell, file_of_image, frames_of, image_cell, undecoded_images
from ..data.loading import iterate_rows, load_rows
from ..data.names import ID_NAMES, IMAGE_SUFFIXES
from ..data.row_files import find_files
from ..data.tars import COMPRESSED, PEEK_SAMPLES, check_end, is_image, names_end_at_last_dot, split_name
from .items import Item, TarImage

MAX_PATTERN = 4096  # characters; longer text is an image in base64 or a mistake.
ROWS_PER_READ = 100  # Number of rows that are read at once.


class Source(ABC):
    """Images of an input, in a fixed order.

    Attributes:
        left_out (`Counter[str]`): number of files that were left out, by reason. It grows while the source is read.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    @abstractmethod
    def __iter__(self) -> Iterator[Item]:
        """Yield the images. No list of all of them is kept."""

    def count(self) -> int | None:
        """Return the number of images, or `None` if only reading all of them would tell. It may be an estimate."""
        return None


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


class FileSource(Source):
    """One image: a file, a URL, or base64 text. Also a file of features (.npy)."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __iter__(self) -> Iterator[Item]:
        is_file = len(self.name) <= MAX_PATTERN and os.path.isfile(self.name)
        yield Item(self.name, self.name, self.name, self.name if is_file else None)

    def count(self) -> int:
        return 1


class FolderSource(Source):
    """Images in a folder and its subfolders, in the order of names.

    Hidden files and folders, files without a suffix of images, and links to folders are left out. Only the names of the
    folders on the way to an image are in memory.
    """

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def __iter__(self) -> Iterator[Item]:
        for file in self._walk(self.folder, self.left_out):
            yield Item(file, file, file, file)

    def count(self) -> int:
        return sum(1 for _ in self._walk(self.folder, Counter()))

    def _walk(self, folder: str, left_out: Counter[str]) -> Iterator[str]:
        try:
            with os.scandir(folder) as entries:  # a slash marks a folder, which spares a look at the disk later
                names = [f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries]
        except OSError as error:
            raise InputError(f"The folder {folder!r} cannot be read ({one_line(error.strerror, 100)}).") from error
        names.sort(key=lambda name: name.rstrip("/"))
        for name in names:
            path = os.path.join(folder, name.rstrip("/"))
            if name.startswith("."):  # also `._dog.jpg`, which macOS writes
                left_out["hidden files or folders"] += 1
            elif name.endswith("/"):
                yield from self._walk(path, left_out)
            elif os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                left_out["files that are not images"] += 1
            elif os.path.isdir(path):
                left_out["links to folders"] += 1
            else:
                yield path


class NamesSource(Source):
    """Images of many names: files, folders, patterns, URLs, tars or parquet files.

    Args:
        names: the names. They may be a stream.
        total: number of names, if each is one image; `None` if unknown.
        image_column: column of images in parquet files.
    """

    def __init__(self, names: Iterable[str], total: int | None = None, image_column: str = "image"):
        super().__init__()
        self.names, self.total, self.image_column = names, total, image_column

    def __iter__(self) -> Iterator[Item]:
        for name in self.names:
            for file in files_named(name):
                try:
                    source = source_of(file, self.image_column)
                    yield from source
                    self.left_out.update(source.left_out)
                except InputError as error:  # one file that cannot be read does not end the others
                    yield Item(file, file, OSError(str(error)))

    def count(self) -> int | None:
        if self.total is not None or not isinstance(self.names, list):
            return self.total
        counts = [source.count() for name in self.names for source in sources_of(name, self.image_column)]
        return None if None in counts else sum(filter(None, counts))


class ChainSource(Source):
    """Several sources one after the other."""

    def __init__(self, sources: list[Source]):
        super().__init__()
        self.sources = sources

    def __iter__(self) -> Iterator[Item]:
        for source in self.sources:
            yield from source
            self.left_out.update(source.left_out)

    def count(self) -> int | None:
        counts = [source.count() for source in self.sources]
        return None if None in counts else sum(filter(None, counts))


def sources_of(name: str, image_column: str = "image") -> list[Source]:
    """Return the sources that a name stands for.

    Args:
        name: a name as [`files_named`] takes it.
        image_column: column of images in parquet files.

    Raises:
        InputError: if a file of a pattern with braces does not exist.
    """
    return [source_of(file, image_column) for file in files_named(name)]


def files_named(name: str) -> list[str]:
    """Return the files that a name stands for.

    Args:
        name: a file, a folder, a URL, base64 text, a pattern as in a shell (`**` matches any folders), or numbers in
            braces (`train-{000..015}.tar`). A pattern without a match is the name of a file, whose error names it.

    Raises:
        InputError: if a file of a pattern with braces does not exist.
    """
    if len(name) > MAX_PATTERN or os.path.exists(name) or "://" in name:  # the name of a file may itself have brackets
        return [name]
    if "{" in name and ".." in name:
        return find_files(name)
    return sorted(glob.glob(name, recursive=True)) or [name]


def without_output(names: Iterable[str], output: str | None) -> Iterator[str]:
    """Yield names of inputs, after a check that none of them stands for the output.

    Args:
        names: names as [`files_named`] takes them.
        output: the file of captions, if there is one.

    Raises:
        InputError: if a name stands for the output.
    """
    for name in names:
        if output is not None and any(is_same_file(file, output) for file in files_named(name)):
            raise InputError(f"The output {output!r} is also an input: choose another --output.")
        yield name


def is_same_file(first: str, second: str) -> bool:
    """Return whether two names lead to the same file, also by links. `False` if one does not exist."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # also for a URL or base64 text
        return False


def source_of(name: str, image_column: str) -> Source:
    """Return the source of a folder, a tar, a parquet file, or one image."""
    if len(name) <= MAX_PATTERN and os.path.isdir(name):
        return FolderSource(name)
    suffix = Path(name[-20:]).suffix.lower()
    if suffix == ".parquet":
        return RowsSource(name, image_column=image_column, streaming=True)
    if suffix in (".tar", ".tgz") or name.lower().endswith(".tar.gz"):
        return TarSource(name)
    return FileSource(name)


def names_in(path: str) -> Iterator[str]:
    """Yield the names in a file, one on each line, or those of stdin for `-`.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        if path == "-":
            yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
            return
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            yield from filter(None, (line.rstrip("\r\n") for line in file))
    except OSError as error:
        raise InputError(f"The list of files {path!r} cannot be read ({error.strerror}): check the path.") from error


# ----------------------------------------------------------------------------------------------------------------------
# Tars
# ----------------------------------------------------------------------------------------------------------------------


class TarSource(Source):
    """Images of a tar in the form of webdataset. The first image of each sample counts.

    The images of an uncompressed tar are read where they are needed, by their place in the tar.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def __iter__(self) -> Iterator[Item]:
        try:
            check_end(self.path)
            with open(self.path, "rb") as opened:
                is_compressed = opened.read(2) in COMPRESSED
            with tarfile.open(self.path) as archive:
                for key, member in self._samples(archive):
                    image: Any = TarImage(self.path, member.offset_data, member.size, member.name)
                    if is_compressed:
                        file: IO[bytes] | None = archive.extractfile(member)
                        image = {"path": member.name, "bytes": b"" if file is None else file.read()}
                    yield Item(f"{self.path}::{member.name}", key, image)
        except (tarfile.TarError, EOFError) as error:
            raise InputError(f"The tar {self.path!r} cannot be read ({one_line(error, 150)}).") from error
        except OSError as error:
            raise InputError(f"The tar {self.path!r} cannot be read ({error.strerror or error}).") from error

    def _samples(self, archive: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
        """Yield the key and the first image of each sample."""
        members = files_of(archive)
        first = list(islice(members, 2 * PEEK_SAMPLES))
        last_dot = names_end_at_last_dot([member.name for member in first])
        previous: str | None = None
        suffixes: set[str] = set()
        has_image = False
        for member in chain(first, members):
            key, suffix = split_name(member.name, last_dot)
            if not key or not suffix:
                self.left_out["files that are not images"] += 1
                continue
            if key != previous or suffix in suffixes:  # a repeated file begins another sample
                previous, suffixes, has_image = key, set(), False
            suffixes.add(suffix)
            if is_image(suffix) and not has_image:
                has_image = True
                yield key, member


def files_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the files of a tar. Python would keep the headers of all of them in memory."""
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        if member.isfile():
            yield member


# ----------------------------------------------------------------------------------------------------------------------
# Data sets
# ----------------------------------------------------------------------------------------------------------------------


class RowsSource(Source):
    """Images in the rows of a data set on the Hub, a folder, or files of rows.

    Args:
        name: the data set, as [`load_rows`] takes it.
        config_name: name of one of its configurations.
        revision: branch, tag or commit on the Hub.
        split: split to read; by default all of them, one after the other.
        image_column: column of images or paths.
        image_id_column: column of ids. By default it is `image_id` or `id`. Without one, the id is the file or the
            number of the row.
        image_folder: folder where paths start, if it is not that of the rows.
        allowed_image_folders: further folders that paths may lead into.
        streaming: read rows on demand, and do not store them.

    Raises:
        InputError: if the data set or a column does not exist.
    """

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        revision: str | None = None,
        split: str | None = None,
        image_column: str = "image",
        image_id_column: str | None = None,
        image_folder: str | None = None,
        allowed_image_folders: list[str] | None = None,
        streaming: bool = False,
    ):
        super().__init__()
        self.name = name
        splits = load_rows(name, config_name, split=split, revision=revision, streaming=streaming)
        self.splits = splits if split is None else {split: splits[split]}
        self.columns: dict[str, tuple[str, str | None]] = {}
        self.folders: dict[str, ImageFolder | None] = {}
        for label, rows in self.splits.items():
            column, existing = image_column_of(rows, image_column), column_names(rows)
            if isinstance(rows, datasets.Dataset):
                self.splits[label] = rows = with_nested_columns(rows, column, *filter(None, [image_id_column]))
                existing = rows.column_names
            for asked, option in ((column, "image_column"), (image_id_column, "image_id_column")):
                if asked is not None and asked.split(".")[0] not in {each.split(".")[0] for each in existing}:
                    raise missing_column(asked, existing, option)
            id_column = image_id_column or next(
                (each for each in ID_NAMES if each in existing and each != column), None
            )
            self.columns[label] = column, id_column
            self.folders[label] = folder_of_images(name, rows, image_folder, allowed_image_folders)

    def __iter__(self) -> Iterator[Item]:
        for label, rows in self.splits.items():
            column, id_column = self.columns[label]
            for number, (cell, image_id) in enumerate(self._cells(rows, column, id_column)):
                file = file_of_image(cell)
                if not is_id(image_id):
                    image_id = number if file is None else file
                image, path = self._locate(cell, self.folders[label])
                yield Item(f"{self.name}:{label}:{number}", image_id, image, path)

    def _cells(self, rows: Any, column: str, id_column: str | None) -> Iterator[tuple[Any, Any]]:
        """Yield the image and the id of each row, undecoded."""
        if isinstance(rows, datasets.IterableDataset):
            for row in iterate_rows(rows, self.name):
                yield nested_value(row, column), None if id_column is None else nested_value(row, id_column)
            return
        images = undecoded_images(rows, column, "--image_column")
        ids = None if id_column is None else rows.select_columns(id_column)
        for start in range(0, len(images), ROWS_PER_READ):
            some = range(start, min(start + ROWS_PER_READ, len(images)))
            cells = images[some.start : some.stop][column]
            yield from zip(
                cells, [None] * len(some) if ids is None else ids[some.start : some.stop][id_column], strict=True
            )

    def _locate(self, value: Any, folder: ImageFolder | None) -> tuple[Any, str | None]:
        """Return an image that can be opened anywhere, and its file if it has one."""
        try:
            cell: Cell = image_cell(value)
            frames = frames_of(cell)
            if len(frames) != 1:
                raise OSError(f"The row has {len(frames)} images, and the command captions rows of one image.")
            frame = frames[0]
            path = None if frame is None else file_of_image(frame)
            if frame is None or frame["bytes"] is not None or path is None or "://" in path:
                return frame, None
            located = str(path if folder is None else folder.locate(path))
            return {"bytes": None, "path": located}, located
        except OSError as error:
            return error, None

    def count(self) -> int | None:
        if all(isinstance(rows, datasets.Dataset) for rows in self.splits.values()):
            return sum(map(len, self.splits.values()))
        if self.name.endswith(".parquet") and os.path.isfile(self.name):
            from pyarrow import parquet

            return parquet.read_metadata(self.name).num_rows
        return None
