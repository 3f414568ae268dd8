"""Outputs of `qformer-captioner caption`: each class writes captions in one form, and continues after a kill.

To add a form, write a subclass of [`Output`] and name its ending in [`OUTPUTS`].
"""

import csv
import io
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..common.errors import InputError
from ..common.files import atomic_path
from .items import Item

if TYPE_CHECKING:
    from .rows import CaptionedRow

ROWS_SUFFIX = ".rows"
ROWS_PER_GROUP = 10_000  # of a parquet file
METADATA = "metadata"  # name of the file that describes the images of a folder, without its suffix


@dataclass
class OutputRow:
    """Item with its captions.

    Args:
        item: the item.
        row: its captions and scores.
        content: the file of its image as it was, if an output keeps it.
    """

    item: Item
    row: "CaptionedRow"
    content: bytes | None = None


class Output(ABC):
    """Form in which captions are written.

    A batch is written in two steps, with a line in the record of the run in between. After a kill, [`resume`] gets what
    [`prepare`] returned for the last batch in the record. Whatever was written after that is undone.
    """

    keeps_content = False  # of the images
    is_file = True  # a file of all captions, to which later runs add

    @abstractmethod
    def resume(self, record: Any | None) -> None:
        """Open the output as it was after a batch.

        Args:
            record: what [`prepare`] returned for the batch; `None` before the first one.

        Raises:
            InputError: if the output is not what the record says.
        """

    @abstractmethod
    def prepare(self, rows: list[OutputRow]) -> Any:
        """Write a batch so that it can be undone, and return plain JSON that [`resume`] needs."""

    def apply(self, record: Any) -> None:  # noqa: B027 -- most outputs have nothing to do
        """Complete a batch that is in the record of the run. This may be repeated."""

    def finish(self) -> Any:
        """Complete the output after the last batch, and return plain JSON that [`check`] needs."""
        return None

    def check(self, ending: Any) -> None:  # noqa: B027
        """Check that the output of a run that has ended is as the run left it.

        Args:
            ending: what [`finish`] returned.

        Raises:
            InputError: if the output was changed.
        """

    def close(self) -> None:  # noqa: B027
        """Close files."""


# ----------------------------------------------------------------------------------------------------------------------
# Files that grow
# ----------------------------------------------------------------------------------------------------------------------


class GrowingFile(Output):
    """File to which batches are appended.

    Args:
        path: the file.
        several: whether images have several captions.
        scores: names of the columns of scores.
    """

    def __init__(self, path: str | os.PathLike, several: bool = False, scores: tuple[str, ...] = ()):
        self.path, self.several = Path(path), several
        self._file: IO[bytes] | None = None
        self.rows = 0  # images in the file
        self.id_name = "file_name" if self.path.stem == METADATA else "image_id"
        self.columns = (self.id_name, "caption", *scores)

    def resume(self, record: Any | None) -> None:
        end, self.rows = record or (0, 0)
        self.path.touch()
        self._file = self.path.open("r+b")
        if os.fstat(self.file.fileno()).st_size < end:
            raise InputError(
                f"{str(self.path)!r} is shorter than the run left it: restore it, or replace it with "
                "--overwrite_output."
            )
        self.file.truncate(end)
        self.file.seek(end)

    @property
    def files(self) -> list[Path]:
        """The files of the output."""
        return [self.path]

    def finish(self) -> Any:
        return [file.stat().st_size for file in self.files]

    def check(self, ending: Any) -> None:
        for file, size in zip(self.files, ending, strict=True):
            if file.exists() and file.stat().st_size != size:
                raise InputError(
                    f"{str(file)!r} was changed after the run: restore it, choose another --output, or replace it with "
                    "--overwrite_output."
                )

    def prepare(self, rows: list[OutputRow]) -> Any:
        content = self.beginning() if self.file.tell() == 0 else b""
        self.file.write(content + self.encode(rows))
        self.file.flush()
        self.rows += len(rows)
        return [self.file.tell(), self.rows]

    def beginning(self) -> bytes:
        """Return what the file begins with."""
        return b""

    @abstractmethod
    def encode(self, rows: list[OutputRow]) -> bytes:
        """Return a batch in the form of the file."""

    def fields(self, output: OutputRow) -> dict[str, Any]:
        """Return the columns of an image: its id, captions and scores. With several captions they are lists."""
        row = output.row
        values: dict[str, list] = {"caption": row.captions, "score": row.scores, "matching_score": row.matching_scores}
        columns = {name: value if self.several else value[0] for name, value in values.items() if value}
        return {self.id_name: self.id_of(output.item), **columns}

    def id_of(self, item: Item) -> int | str:
        """Return what identifies an image in the file. In the metadata of a folder, it is a path from there."""
        if self.id_name == "image_id" or item.path is None:
            return item.image_id
        return Path(os.path.relpath(item.path, self.path.parent)).as_posix()

    @property
    def file(self) -> IO[bytes]:
        """The open file, at the place where the next batch begins."""
        assert self._file is not None, "`resume` opens it"
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class JsonLines(GrowingFile):
    """A JSON object for each image: `{"image_id": "dog.jpg", "caption": "a dog"}`."""

    def encode(self, rows: list[OutputRow]) -> bytes:
        return b"".join(json_line(self.fields(row)) for row in rows)


class Csv(GrowingFile):
    """A line for each caption, below the names of the columns. Several captions become several lines."""

    def __init__(self, path: str | os.PathLike, several: bool = False, scores: tuple[str, ...] = ()):
        super().__init__(path, several=True, scores=scores)

    def beginning(self) -> bytes:
        return ",".join(self.columns).encode() + b"\n"

    def encode(self, rows: list[OutputRow]) -> bytes:
        text = io.StringIO()
        lines = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        for row in rows:
            fields = self.fields(row)
            image_id = fields.pop(self.id_name)
            for values in zip(*fields.values(), strict=True):
                lines.writerow({self.id_name: image_id, **dict(zip(fields, values, strict=True))})
        return text.getvalue().encode("utf-8", "backslashreplace")


class Tar(GrowingFile):
    """Samples of webdataset: the image as it was, its captions as text, and all columns as JSON.

    The names of the samples are numbers, because names of files may repeat and have dots.
    """

    keeps_content = True

    def encode(self, rows: list[OutputRow]) -> bytes:
        blocks = []
        for number, row in enumerate(rows, start=self.rows):
            if row.content is None:
                raise InputError(f"The image {row.item.key[-200:]!r} has no file to copy: use another --output.")
            captions = "".join(" ".join(caption.split()) + "\n" for caption in row.row.captions)
            files = {suffix_of(row.content): row.content, "txt": captions.encode(), "json": json_line(self.fields(row))}
            for suffix, content in files.items():
                header = tarfile.TarInfo(f"{number:09d}.{suffix}")
                header.size = len(content)
                padding = bytes(-len(content) % tarfile.BLOCKSIZE)
                blocks += [header.tobuf(tarfile.USTAR_FORMAT), content, padding]
        return b"".join(blocks)

    def finish(self) -> Any:
        end = self.file.tell()
        self.file.write(bytes(2 * tarfile.BLOCKSIZE))
        self.file.flush()
        self.file.seek(end)
        return super().finish()


# ----------------------------------------------------------------------------------------------------------------------
# Files that are written at the end
# ----------------------------------------------------------------------------------------------------------------------


class WholeFile(JsonLines):
    """File that can only be written as a whole. Until the end its rows are in a file `NAME.rows` beside it."""

    def __init__(self, path: str | os.PathLike, several: bool = False, scores: tuple[str, ...] = ()):
        super().__init__(f"{os.fspath(path)}{ROWS_SUFFIX}", several, scores)
        self.final = Path(path)

    @property
    def files(self) -> list[Path]:
        return [self.path, self.final]

    def finish(self) -> Any:
        with atomic_path(self.final) as unfinished:
            self.write(unfinished)
        return super().finish()

    @abstractmethod
    def write(self, path: Path) -> None:
        """Write the final file."""

    def stored(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, one by one."""
        with self.path.open("rb") as file:
            yield from map(json.loads, file)


class Parquet(WholeFile):
    """Parquet file with a column for the id, the captions and each score. Ids are integers or strings."""

    def write(self, path: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        kinds = {"caption": pa.string(), "score": pa.float64(), "matching_score": pa.float64()}
        first = next(self.stored(), {"caption": None})
        fields = [(name, pa.list_(kind) if self.several else kind) for name, kind in kinds.items() if name in first]
        all_integers = all(isinstance(row[self.id_name], int) for row in self.stored())
        schema = pa.schema([(self.id_name, pa.int64() if all_integers and self.rows else pa.string()), *fields])
        with parquet.ParquetWriter(path, schema) as file:
            stored = self.stored()
            while rows := list(islice(stored, ROWS_PER_GROUP)):
                if not all_integers:
                    rows = [{**row, self.id_name: clean(str(row[self.id_name]))} for row in rows]
                file.write_table(pa.Table.from_pylist(rows, schema))


class CocoResults(WholeFile):
    """COCO's results: a list of objects with `image_id` and `caption`.

    Raises:
        InputError: if images have several captions.
    """

    def __init__(self, path: str | os.PathLike, several: bool = False, scores: tuple[str, ...] = ()):
        if several:
            raise InputError("COCO's .json has one caption for each image: use .jsonl for --num_return_sequences.")
        super().__init__(path, several, scores)

    def write(self, path: Path) -> None:
        with path.open("w") as file:
            file.write("[")
            for number, row in enumerate(self.stored()):
                file.write(", " * (number > 0) + json.dumps(row))
            file.write("]\n")


# ----------------------------------------------------------------------------------------------------------------------
# Endings
# ----------------------------------------------------------------------------------------------------------------------

OUTPUTS: dict[str, type[GrowingFile]] = {
    ".jsonl": JsonLines,
    ".csv": Csv,
    ".parquet": Parquet,
    ".tar": Tar,
    ".json": CocoResults,
}


def output_for(path: str, several: bool = False, scores: tuple[str, ...] = ()) -> GrowingFile:
    """Return the output for the ending of a file.

    Args:
        path: the file.
        several: whether images have several captions.
        scores: names of the columns of scores.

    Raises:
        InputError: if the ending is not among `OUTPUTS`.
    """
    kind = OUTPUTS.get(Path(path).suffix.lower())
    if kind is None:
        raise InputError(f"The ending of --output {path[-100:]!r} does not say a form: use {', '.join(OUTPUTS)}.")
    return kind(path, several, scores)


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSON in UTF-8. Names of files that are not UTF-8 are escaped."""
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


def clean(text: str) -> str:
    """Return a text in which bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def suffix_of(content: bytes) -> str:
    """Return the suffix of an image by the first bytes of its file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            kind = str(image.format).lower()
    except UnidentifiedImageError:
        return "jpg"
    return {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif", "heif": "heic"}.get(kind, kind)
