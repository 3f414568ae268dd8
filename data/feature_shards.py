"""TODO."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import BaseImageProcessor

from ..backbones_qformer import commit_of
from ..common.errors import InputError

INDEX, SKIPPED = "index.json", "skipped_rows.jsonl"
FORMAT = 1
SPLIT_NAME = r"\w[\w.-]*"  # of which the folders of splits are named
DATASET_FIELDS = (
    "name", "config_name", "revision", "split_column", "image_column", "image_folder", "embeddings_column"
)  # fmt: skip


# Whose features


@dataclass(frozen=True)
class VisionKey:
    """What features depend on: the vision encoder's weights, and how its image processor prepares an image.

    Weights of the Hub are told by name and commit, those of a folder by their content: a folder may move, and may be
    trained on.
    """

    name_or_path: str
    revision: str | None
    weights_sha256: str | None
    image_processor: dict

    @classmethod
    def of(cls, name_or_path: str, revision: str | None, image_processor: BaseImageProcessor) -> "VisionKey":
        """Look up commit or content.

        Raises:
            OSError: if there is no such model.
        """
        weights = None
        if os.path.isdir(name_or_path):
            name_or_path = os.path.abspath(name_or_path)
            files = [path for path in Path(name_or_path).iterdir() if path.suffix in (".safetensors", ".bin")]
            digest = hashlib.sha256()
            for path in sorted(files):
                with path.open("rb") as file:
                    hashlib.file_digest(file, lambda: digest)
            weights = digest.hexdigest()
        config = json.loads(image_processor.to_json_string())
        for not_of_images in ("auto_map", "processor_class"):
            config.pop(not_of_images, None)
        return cls(str(name_or_path), commit_of(name_or_path, revision), weights, config)

    def same_weights(self, other: "VisionKey") -> bool:
        if self.weights_sha256 is not None or other.weights_sha256 is not None:
            return self.weights_sha256 == other.weights_sha256
        return (self.name_or_path, self.revision) == (other.name_or_path, other.revision)

    def __str__(self) -> str:
        version = f"weights {self.weights_sha256[:12]}" if self.weights_sha256 else f"revision {self.revision}"
        return f"{self.name_or_path!r} ({version})"


# Where they are


@dataclass(frozen=True)
class SplitLayout:
    """Where the features of a split are: row `r` is in shard `r // rows_per_shard`.

    Args:
        folder: of the split's shards.
        rows: of the split.
        rows_per_shard: the last shard may have fewer.
        views: of each image.
        shape: `(N, Dv)`, of one view.
        dtype: "float16" or "float32".
    """

    folder: Path
    rows: int
    rows_per_shard: int
    views: int
    shape: tuple[int, int]
    dtype: str

    def __post_init__(self):
        numbers = (self.rows, self.rows_per_shard, self.views, *self.shape)
        if not all(type(number) is int for number in numbers) or self.rows < 0 or min(numbers[1:]) < 1:
            raise ValueError(f"rows, views or shape are no sizes: {list(numbers)}")
        if len(self.shape) != 2 or self.dtype not in ("float16", "float32"):
            raise ValueError(f"features are no [N, D] of float16 or float32, but {list(self.shape)} of {self.dtype!r}")

    @property
    def view_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize

    @property
    def shards(self) -> range:
        return range(-(-self.rows // self.rows_per_shard))

    def rows_of(self, shard: int) -> range:
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def bytes_of(self, shard: int) -> int:
        return len(self.rows_of(shard)) * self.views * self.view_bytes

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.npy"

    @property
    def keys_path(self) -> Path:
        """What tells the rows apart, `[rows]` uint64; features that a data set had already have none."""
        return self.folder / "rows.npy"

    def skipped_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.skipped.jsonl"

    def start_of(self, shard: int) -> int:
        """Where the numbers of a shard begin in its file.

        Raises:
            OSError, ValueError: if it is not there, or is not what it should be.
        """
        array = np.lib.format.open_memmap(self.path(shard), mode="r")  # reads the header, and checks the size
        expected = (len(self.rows_of(shard)), self.views, *self.shape)
        if array.shape != expected or array.dtype != self.dtype:
            raise ValueError(f"it holds {array.dtype} {list(array.shape)}, not {self.dtype} {list(expected)}")
        return array.offset

    def is_complete(self, shard: int) -> bool:
        try:
            self.start_of(shard)
        except (OSError, ValueError):
            return False
        return True

    def write(self, shard: int, features: Iterable[tuple[np.ndarray, list[dict]]]) -> None:
        """Write a shard out of batches `[rows, views, N, Dv]` and entries of skipped rows, all of it or nothing.

        A kill leaves a file of another name behind, see [`~SplitLayout.remove_unfinished`].
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self.path(shard).with_suffix(f".{os.getpid()}.tmp")  # nobody else's, should the run go on twice
        skipped = []
        with unfinished.open("wb") as file:
            shape = (len(self.rows_of(shard)), self.views, *self.shape)
            header = {"descr": np.dtype(self.dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for array, entries in features:
                file.write(np.ascontiguousarray(array).data)
                skipped += entries
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave a whole file of zeros
        self.skipped_path(shard).unlink(missing_ok=True)
        if skipped:
            write_whole(self.skipped_path(shard), "".join(json.dumps(entry) + "\n" for entry in skipped))
        unfinished.replace(self.path(shard))

    def remove_unfinished(self) -> None:
        """Throw away what killed runs have left behind."""
        for path in self.folder.glob("*.tmp"):
            path.unlink()

    def skipped_lines(self) -> Iterator[str]:
        for shard in self.shards:
            if self.skipped_path(shard).exists():
                yield self.skipped_path(shard).read_text()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    unfinished.replace(path)


def row_keys(images: datasets.Dataset, column: str) -> np.ndarray:
    """What tells rows of undecoded images apart, in 8 bytes each: an image's file name and its size in the data set.

    Folders may move; rows must not.
    """
    keys = []
    for batch in images.select_columns(column).with_format("arrow").iter(1000):
        cells = pa.chunked_array(batch.column(column)).combine_chunks()
        sizes = pc.binary_length(cells.field("bytes")).to_pylist()
        for path, size in zip(cells.field("path").to_pylist(), sizes, strict=True):
            text = f"{os.path.basename(path or '')}|{size}".encode()
            keys.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    return np.array(keys, dtype=np.uint64)


def finish_store(folder: Path, vision: VisionKey, dataset: dict, splits: dict[str, SplitLayout]) -> int:
    """Write what makes a folder of shards a store; returns the number of rows without features.

    Raises:
        InputError: if a split has no features at all.
    """
    text = ""
    for name, layout in splits.items():
        own = "".join(layout.skipped_lines())
        if 0 < layout.rows == own.count("\n"):
            reason = json.loads(own.split("\n")[0])["reason"]
            raise InputError(
                f"Not one row of the split {name!r} can be used ({reason}): check the column, or the files, and give "
                "the command with --overwrite_output_dir."
            )
        text += own
    write_whole(folder / SKIPPED, text)
    fields = ("rows", "rows_per_shard", "views", "shape", "dtype")
    index = {
        "format": FORMAT,
        "vision_model": asdict(vision),
        "dataset": dataset,
        "splits": {name: {field: getattr(layout, field) for field in fields} for name, layout in splits.items()},
    }
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return text.count("\n")
