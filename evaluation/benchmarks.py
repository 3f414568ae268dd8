"""The standard caption benchmarks: where their images and references are, and how papers caption them."""

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from PIL import Image

from ..common.errors import InputError
from ..data.captions import captions_of
from ..data.columns import with_nested_columns
from ..data.images import folder_of_images, image_keys, locate, open_cell
from ..data.loading import load_rows
from .caption_files import ImageId, ReferenceSet


@dataclass(frozen=True)
class Benchmark:
    """A data set on the Hub, its columns, and the protocol of the paper that it is reported by.

    Args:
        dataset_name, split: of the Hub.
        image_column: of images, or of addresses of images.
        caption_column: of references: a string, a list of strings, or a list of `{"raw": string}`.
        id_column: of the image ids that result files carry.
        images, captions: how many there must be.
        row_per_caption: whether an image has a row for each of its captions.
        split_column: has the split's name in the rows that belong to the benchmark, where others stand beside them.
        domains: address of COCO annotation JSON that says which domain an image is of, where the data set does not.
        domain_id_column: of the ids in that file.
        prompt, generation: the protocol; where a benchmark has none of its own, BLIP-2's (arXiv 2301.12597).
        hidden_references: whether only the benchmark's server has them.
    """

    dataset_name: str
    split: str
    image_column: str
    caption_column: str
    id_column: str
    images: int
    captions: int
    row_per_caption: bool = False
    split_column: str = "split"
    domains: str | None = None
    domain_id_column: str | None = None
    prompt: str = "a photo of"
    generation: dict[str, int | float] = field(
        default_factory=lambda: {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8}
    )
    hidden_references: bool = False


_KARPATHY = {
    "image_column": "image",
    "caption_column": "caption",
    "id_column": "cocoid",
    "images": 5_000,
    "captions": 25_010,
    "row_per_caption": True,
}
_NOCAPS = {
    "image_column": "image",
    "caption_column": "annotations_captions",
    "id_column": "image_id",
    "generation": {"num_beams": 5, "max_new_tokens": 80, "min_new_tokens": 10},
}
BENCHMARKS = {
    "coco_karpathy_test": Benchmark("jxie/coco_captions", "test", **_KARPATHY),
    "coco_karpathy_validation": Benchmark("jxie/coco_captions", "validation", **_KARPATHY),
    "nocaps_validation": Benchmark(
        "lmms-lab/NoCaps",
        "validation",
        images=4_500,
        captions=45_000,
        domains="https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json",
        domain_id_column="image_open_images_id",
        **_NOCAPS,
    ),
    "nocaps_test": Benchmark("lmms-lab/NoCaps", "test", images=10_600, captions=0, hidden_references=True, **_NOCAPS),
    "flickr30k_karpathy_test": Benchmark(
        "umaru97/flickr30k_train_val_test",
        "test",
        "image",
        "caption",
        "img_id",
        images=1_000,
        captions=5_000,
    ),
}


@dataclass
class EvaluationSet:
    """Images to caption, by their ids, and their references."""

    references: ReferenceSet
    rows: datasets.Dataset  # one column, of undecoded images
    row_of: dict[ImageId, int]
    image_folder: Path | None = None  # inside which paths of images lie

    def __str__(self) -> str:
        """How many images and captions there are, in all and of each domain."""
        domains = sorted(Counter(self.references.domains.values()).items())
        parts = "".join(f", {count} {domain}" for domain, count in domains)
        return f"{len(self.row_of)} images, {self.references.number_of_captions} captions{parts}"

    def open(self, image: ImageId) -> Image.Image:
        """Open an image.

        Raises:
            OSError: if it cannot be read; the message names it.
        """
        (cell,) = self.rows[self.row_of[image]].values()
        return open_cell(cell, self.image_folder)

    def fingerprints(self) -> dict[ImageId, str]:
        """What tells each image from another in its place: name and size in the data set, size and time of its file."""
        own = self.rows.select(self.row_of.values())
        (column,) = own.column_names
        keys = image_keys(own, column)
        return {
            image: f"{key:016x}{self._file_of(cell)}"
            for image, key, cell in zip(self.row_of, keys.tolist(), own[column], strict=True)
        }

    def _file_of(self, cell: dict | None) -> str:
        """Size and time of an image's file; nothing where it is inside another, or not there."""
        if cell is None or cell["bytes"] is not None or not cell["path"]:
            return ""
        try:
            file = Path(cell["path"]) if self.image_folder is None else locate(cell["path"], self.image_folder)
            found = file.stat()
        except (OSError, ValueError):  # the latter of a name that none can have
            return ""
        return f"-{found.st_size}-{found.st_mtime_ns}"


def benchmark_of(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
        InputError: if there is none.
    """
    if name not in BENCHMARKS:
        raise InputError(f"There is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def load_benchmark(
    name: str, dataset_name: str | None = None, image_folder: str | os.PathLike | None = None
) -> EvaluationSet:
    """Load the images and references of a benchmark, and check that all of them are there.

    Args:
        name: a key of `BENCHMARKS`.
        dataset_name: a copy (Hub id or folder) with the same columns, in place of the one on the Hub.
        image_folder: where the images are that its rows name, if it is another folder than the copy's.

    Raises:
        InputError: for an unknown benchmark, a data set that cannot be loaded, or other counts than the benchmark's.
    """
    benchmark = benchmark_of(name)
    source = dataset_name or benchmark.dataset_name
    rows = load_rows(source, split_column=benchmark.split_column, split=benchmark.split)[benchmark.split]
    found = load_evaluation_set(
        rows,
        benchmark.image_column,
        benchmark.caption_column,
        benchmark.id_column,
        benchmark.row_per_caption,
        benchmark.hidden_references,
        folder_of_images(source, rows, image_folder),
    )
    counts = (len(found.row_of), found.references.number_of_captions)
    if counts != (benchmark.images, benchmark.captions):
        raise InputError(
            f"{name} has {benchmark.images} images and {benchmark.captions} captions, but {source!r} has {counts[0]} "
            f"and {counts[1]}: it is another split or an incomplete copy."
        )
    if benchmark.domains is not None:
        _add_domains(found, rows, benchmark)
    return found


def load_evaluation_set(
    rows: datasets.Dataset,
    image_column: str,
    caption_column: str,
    id_column: str | None = None,
    row_per_caption: bool = False,
    hidden_references: bool = False,
    image_folder: Path | None = None,
) -> EvaluationSet:
    """Images and references of a split.

    Args:
        rows: the split.
        image_column, caption_column, id_column: as in [`Benchmark`]; without ids an image's is the number of its row,
            and rows that name the same file are of one image, the first row's.
        row_per_caption: whether rows of the same id are captions of one image, and not a mistake.
        hidden_references: do without references.
        image_folder: paths of images must lie inside this folder; by default they may lie anywhere.

    Raises:
        InputError: for a column that is not there, an image without a caption, or ids that are there more than once.
    """
    rows = with_nested_columns(rows, image_column, caption_column)
    for column in (image_column, caption_column, id_column):
        if column is not None and column not in rows.column_names:
            raise InputError(
                f"The data set has no column {column!r}; its columns are {', '.join(map(repr, rows.column_names))}. "
                "Choose with --image_column, --caption_column and --id_column."
            )
    images = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    cells = images[image_column]
    if id_column is not None:
        ids = rows[id_column]
    else:
        row_of_file: dict[str, int] = {}
        files = [cell["path"] if cell is not None and cell["bytes"] is None else None for cell in cells]
        ids = [
            row if file is None else row_of_file.setdefault(os.path.normpath(file), row)
            for row, file in enumerate(files)
        ]
    captions: dict[ImageId, list[str]] = {}
    row_of: dict[ImageId, int] = {}
    if wrong := [image for image in ids if isinstance(image, bool) or not isinstance(image, ImageId)]:
        raise InputError(f"In the column {id_column!r}, {wrong[0]!r} is no image id (a whole number or a text).")
    for row, (image, value) in enumerate(zip(ids, rows[caption_column], strict=True)):
        row_of.setdefault(image, row)
        captions.setdefault(image, []).extend(captions_of(value))
    twice = [image for image, count in Counter(ids).items() if count > 1]
    if twice and not row_per_caption:
        raise InputError(f"{len(twice)} images are there more than once, the first of them {twice[0]!r}.")
    without = [image for image, own in captions.items() if not own]
    if without and not hidden_references:
        raise InputError(
            f"Image {without[0]!r} has no caption in the column {caption_column!r} ({len(without)} images have none)."
        )
    paths = {image: cells[row]["path"] for image, row in row_of.items() if cells[row] is not None}
    names = {image: os.path.basename(path) for image, path in paths.items() if path}
    return EvaluationSet(ReferenceSet(captions, names), images, row_of, image_folder)


def first_images(found: EvaluationSet, number: int | None) -> EvaluationSet:
    """The first so many images, or all."""
    kept = list(found.row_of)[:number]
    whole = found.references
    references = ReferenceSet(
        *(
            {image: part[image] for image in kept if image in part}
            for part in (whole.captions, whole.files, whole.domains)
        )
    )
    return EvaluationSet(references, found.rows, {image: found.row_of[image] for image in kept}, found.image_folder)


def _add_domains(found: EvaluationSet, rows: datasets.Dataset, benchmark: Benchmark) -> None:
    try:
        with urllib.request.urlopen(benchmark.domains, timeout=60) as file:
            images = json.load(file)["images"]
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"The domains of the images cannot be read from {benchmark.domains!r} ({error}). Check the network, or "
            "score the captions with --predictions and --references once you have that file."
        ) from error
    domain = {image["open_images_id"]: image["domain"] for image in images}
    for image, key in zip(rows[benchmark.id_column], rows[benchmark.domain_id_column], strict=True):
        if key not in domain:
            raise InputError(f"{benchmark.domains!r} has no image {key!r}, which the data set has.")
        found.references.domains[image] = domain[key]
