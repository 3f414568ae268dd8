"""Standard caption benchmarks: their images, references and captioning protocol."""

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets

from ..common.errors import InputError, one_line
from ..data.columns import missing_column, with_nested_columns
from ..data.dataset import CaptionSource, no_caption
from ..data.features import FeatureRef, SplitFeatures
from ..data.image_paths import ImageFolder, folder_of_images
from ..data.images import Cell, ImageCell, Picture, file_of_image, frames_of, image_keys, open_cell, undecoded_images
from ..data.loading import load_rows
from ..data.texts import Text, rows_of_texts
from .caption_files import ImageId, ReferenceSet
from .scoring import FaultyImage


@dataclass(frozen=True)
class Benchmark:
    """Caption benchmark: a data set on the Hub, its columns, and the protocol that papers use.

    Args:
        dataset_name: the data set on the Hub.
        split: its split.
        image_column: column of images, or of URLs of images.
        caption_column: column of references: a string, a list of strings, or a list of `{"raw": string}`.
        id_column: column of the image ids that result files use. `None` numbers the images.
        images: number of images in the split.
        captions: number of references in the split.
        row_per_caption: whether an image has one row for each of its captions.
        split_column: column that names the split of each row, if the data set keeps all rows in one split.
        domains: URL of COCO annotation JSON with the domain of each image, if the data set lacks it.
        domain_id_column: column of the image ids in that file.
        prompt: text that captions continue. By default, prompt and decoding are those of BLIP-2 (arXiv 2301.12597).
        generation: arguments of `generate`.
        hidden_references: whether only the server of the benchmark has the references.
    """

    dataset_name: str
    split: str
    image_column: str
    caption_column: str
    id_column: str | None
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


_COCO_KARPATHY_TEST = Benchmark(
    dataset_name="jxie/coco_captions",
    split="test",
    image_column="image",
    caption_column="caption",
    id_column="cocoid",
    images=5_000,
    captions=25_010,
    row_per_caption=True,
)
_NOCAPS_TEST = Benchmark(
    dataset_name="lmms-lab/NoCaps",
    split="test",
    image_column="image",
    caption_column="annotations_captions",
    id_column="image_id",
    images=10_600,
    captions=0,
    generation={"num_beams": 5, "max_new_tokens": 80, "min_new_tokens": 10},
    hidden_references=True,
)
BENCHMARKS = {
    "coco_karpathy_test": _COCO_KARPATHY_TEST,
    "coco_karpathy_validation": replace(_COCO_KARPATHY_TEST, split="validation"),
    "nocaps_validation": replace(
        _NOCAPS_TEST,
        split="validation",
        images=4_500,
        captions=45_000,
        domains="https://nocaps.s3.amazonaws.com/nocaps_val_4500_captions.json",
        domain_id_column="image_open_images_id",
        hidden_references=False,
    ),
    "nocaps_test": _NOCAPS_TEST,
    "flickr30k_karpathy_test": Benchmark(
        dataset_name="umaru97/flickr30k_train_val_test",
        split="test",
        image_column="image",
        caption_column="caption",
        id_column="img_id",
        images=1_000,
        captions=5_000,
    ),
    "flickr8k_test": Benchmark(
        dataset_name="jxie/flickr8k",
        split="test",
        image_column="image",
        caption_column="caption_0,caption_1,caption_2,caption_3,caption_4",
        id_column=None,
        images=1_000,
        captions=5_000,
    ),
}


@dataclass
class EvaluationSet:
    """Images, or precomputed features, to caption, by id, with their references.

    Args:
        references: the references of the images.
        rows: a data set of one column, which holds undecoded images. `None` for features of rows without images.
        row_of: for each image, the index of its row. Images are captioned in this order.
        image_folder: where paths of images start, and where they may lead; `None` allows any path.
        skipped: images that are left out because they have no caption, or no features.
        prompts: prompt of each image that has its own.
        features: features to caption instead of the images.
        num_frames: largest number of frames to read of a video.
    """

    references: ReferenceSet
    rows: datasets.Dataset | None
    row_of: dict[ImageId, int]
    image_folder: ImageFolder | None = None
    skipped: list[FaultyImage] = field(default_factory=list)
    prompts: dict[ImageId, str] = field(default_factory=dict)
    features: SplitFeatures | None = None
    num_frames: int = 1

    @property
    def num_images(self) -> int:
        """Number of images, including those that are left out."""
        return len(self.row_of) + len(self.skipped)

    def __str__(self) -> str:
        """Return the number of images and captions, and the number of images of each domain."""
        domains = sorted(Counter(self.references.domains.values()).items())
        parts = "".join(f", {count} {domain}" for domain, count in domains)
        kind = "images" if self.features is None else "rows of features"
        return f"{len(self.row_of)} {kind}, {self.references.num_captions} captions{parts}"

    def read(self, image: ImageId) -> Picture | FeatureRef:
        """Return an image, or a reference to its features.

        Args:
            image: id of the image.

        Raises:
            OSError: if it cannot be read; the message names it.
        """
        return self.open(image) if self.features is None else FeatureRef(self.features, self.row_of[image], view=0)

    def open(self, image: ImageId) -> Picture:
        """Open an image, or the frames of a video.

        Args:
            image: id of the image.

        Raises:
            OSError: if it cannot be read, or there are only features; the message names it.
        """
        if self.rows is None:
            raise OSError(f"The row {image!r} has features and no image.")
        (cell,) = self.rows[self.row_of[image]].values()
        return open_cell(cell, self.image_folder, self.num_frames)

    def first(self, number: int | None) -> "EvaluationSet":
        """Return the first images, or all of them if `number` is None."""
        if number is None:
            return self
        images = list(self.row_of)[:number]
        row_of = {image: self.row_of[image] for image in images}
        return replace(self, references=self.references.select(images), row_of=row_of, skipped=[])

    def fingerprints(self) -> dict[ImageId, str]:
        """Return a text for each image that changes if the image or its prompt is replaced.

        It holds a hash of the image's name and size in the data set, the size and time of its file, and its prompt. For
        features, it holds the row, and size and time of the file of features.
        """
        if self.features is not None:
            versions = self.features.versions(list(self.row_of.values()))
            pairs = zip(self.row_of, versions, strict=True)
            return {image: f"{version}{self.prompts.get(image, '')}" for image, version in pairs}
        assert self.rows is not None, "without features there are images"
        rows = self.rows.select(self.row_of.values())
        (column,) = rows.column_names
        keys = image_keys(rows, column).tolist()
        return {
            image: f"{key:016x}{''.join(map(self._file_stamp, frames_of(cell)))}{self.prompts.get(image, '')}"
            for image, key, cell in zip(self.row_of, keys, rows[column], strict=True)
        }

    def _file_stamp(self, cell: ImageCell | None) -> str:
        """Return size and modification time of an image's file, or an empty string if there is no file."""
        if cell is None or cell["bytes"] is not None or not cell["path"]:
            return ""
        try:
            file = Path(cell["path"]) if self.image_folder is None else self.image_folder.locate(cell["path"])
            status = file.stat()
        except (OSError, ValueError):  # ValueError for a name that no file can have
            return ""
        return f"-{status.st_size}-{status.st_mtime_ns}"


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def get_benchmark(name: str) -> Benchmark:
    """Return a benchmark.

    Args:
        name: a key of `BENCHMARKS`.

    Raises:
        InputError: if the benchmark does not exist.
    """
    if name not in BENCHMARKS:
        raise InputError(f"Unknown benchmark {name!r}: choose from {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def load_benchmark(
    name: str,
    dataset_name: str | None = None,
    image_folder: str | os.PathLike | None = None,
    allowed_image_folders: Sequence[str | os.PathLike] | None = None,
) -> EvaluationSet:
    """Load the images and references of a benchmark, and check that they are complete.

    Args:
        name: a key of `BENCHMARKS`.
        dataset_name: a copy of the data set with the same columns (Hub id or folder), to use instead of the original.
        image_folder: folder of the images that the rows name, if it differs from the folder of the copy.
        allowed_image_folders: further folders that paths may lead into.

    Raises:
        InputError: for an unknown benchmark, a data set that cannot be loaded, or a wrong number of images or captions.

    Example:

    ```python
    >>> print(load_benchmark("flickr30k_karpathy_test"))  # doctest: +SKIP
    1000 images, 5000 captions
    ```
    """
    benchmark = get_benchmark(name)
    source = dataset_name or benchmark.dataset_name
    rows = load_rows(source, split_column=benchmark.split_column, split=benchmark.split)[benchmark.split]
    columns = CaptionSource(
        benchmark.split,
        rows,
        benchmark.image_column,
        benchmark.caption_column,
        benchmark.id_column,
        folder_of_images(source, rows, image_folder, allowed_image_folders),
    )
    evaluation_set = load_evaluation_set(columns, benchmark.row_per_caption, benchmark.hidden_references)
    num_images, num_captions = len(evaluation_set.row_of), evaluation_set.references.num_captions
    if (num_images, num_captions) != (benchmark.images, benchmark.captions):
        raise InputError(
            f"{name} has {benchmark.images} images and {benchmark.captions} captions, but {source!r} has {num_images} "
            f"and {num_captions}: it is another split or an incomplete copy."
        )
    if benchmark.domains is not None:
        domain_of = read_domains(benchmark.domains)
        ids = zip(rows[benchmark.id_column], rows[benchmark.domain_id_column], strict=True)
        for image, domain_id in ids:
            if domain_id not in domain_of:
                raise InputError(f"{benchmark.domains!r} has no image {domain_id!r}, which the data set has.")
            evaluation_set.references.domains[image] = domain_of[domain_id]
    return evaluation_set


def read_domains(url: str) -> dict[str, str]:
    """Return the domain of each image of NoCaps, by its Open Images id.

    Args:
        url: COCO annotation JSON whose images have `open_images_id` and `domain`.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as file:
            return {image["open_images_id"]: image["domain"] for image in json.load(file)["images"]}
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The domains of the images cannot be read from {url!r} ({one_line(error, 200)}). Check the network, or "
            "score the captions with --predictions and --references."
        ) from error


def load_evaluation_set(
    source: CaptionSource,
    row_per_caption: bool = True,
    hidden_references: bool = False,
    features: SplitFeatures | None = None,
) -> EvaluationSet:
    """Return the images and references of a split. An image with several prompts is one image for each prompt.

    Args:
        source: the rows of the split and their columns. Without a column of image ids, the id of an image is the index
            of its first row. Rows with the same file and the same prompt then belong to one image.
        row_per_caption: accept several rows for one image, each with some of its captions.
        hidden_references: keep images without captions. Otherwise they are left out, and listed in the result.
        features: precomputed features of the rows, to caption instead of the images. Rows without features are left
            out, too.

    Raises:
        InputError: for a column that does not exist or holds no images, or an id that is not valid. Also for an image
            that occurs more than once or has several prompts with one id, or if no image has a caption.
    """
    image_column, id_column = source.image_column, source.image_id_column
    rows = with_nested_columns(source.rows, image_column)
    needed = {"image_column": image_column if features is None else None, "image_id_column": id_column}
    for option, column in needed.items():
        if column is not None and column not in rows.column_names:
            raise missing_column(column, rows.column_names, option)
    texts = list(rows_of_texts(rows, source.caption_column, source.prompt_column))
    images = images_of(rows, image_column, features, source.name)
    cells = [None] * len(rows) if images is None else images[image_column]
    ids = _ids_by_file(cells, texts) if id_column is None else _ids_in_column(rows, id_column, texts)
    captions: dict[ImageId, list[str]] = {}
    row_of: dict[ImageId, int] = {}
    prompts: dict[ImageId, str] = {}
    reasons: dict[ImageId, str] = {}
    for image, (row, text) in zip(ids, texts, strict=True):
        row_of.setdefault(image, row)
        reasons.setdefault(image, text.reason)
        captions.setdefault(image, []).extend(text.captions)
        if prompts.setdefault(image, text.prompt) != text.prompt:
            raise InputError(
                f"The image {image!r} has several prompts: leave out --image_id_column, so that each prompt of an "
                "image gets its own id."
            )
    repeated = [image for image, count in Counter(ids).items() if count > 1]
    if repeated and not row_per_caption:
        raise InputError(f"{len(repeated)} images occur more than once; the first of them is {repeated[0]!r}.")
    # Frames of different videos have the same names, so videos have none.
    paths = {image: file_of_image(cells[row]) for image, row in row_of.items() if len(frames_of(cells[row])) == 1}
    names = {image: os.path.basename(path) for image, path in paths.items() if path}
    if not any(captions.values()) and not hidden_references:
        raise no_caption(source)
    missing = {image for image, texts in captions.items() if not (texts or hidden_references)}
    for image, row in row_of.items():
        if features is not None and row in features.reasons and image not in missing:
            reasons[image] = f"no features: {features.reasons[row]}"
            missing.add(image)
    usable = [image for image in captions if image not in missing]
    if not usable:
        raise InputError(f"No row of the {source.name} split with a caption has features.")
    skipped = [
        FaultyImage(image, str(names.get(image, image)), reasons[image]) for image in captions if image in missing
    ]
    references = ReferenceSet(captions, names).select(usable)
    return EvaluationSet(
        references,
        images,
        {image: row_of[image] for image in usable},
        source.image_folder,
        skipped,
        {image: prompts[image] for image in usable if prompts[image]},
        features,
        source.num_frames,
    )


def images_of(
    rows: datasets.Dataset, column: str, features: SplitFeatures | None, split: str
) -> datasets.Dataset | None:
    """Return the undecoded images of rows, or `None` for rows that have only features.

    Raises:
        InputError: if the column does not hold images, or the features belong to other rows.
    """
    if features is None:
        return undecoded_images(rows, column, "--image_column")
    features.check_length(split, len(rows))
    if not features.have_keys:
        return None
    images = undecoded_images(rows, column, "--image_column")
    features.check_rows(images, column)
    return images


def _ids_in_column(rows: datasets.Dataset, column: str, texts: Sequence[tuple[int, Text]]) -> list[ImageId]:
    """Return the id of the image of each text."""
    ids = list(rows[column])
    for image in ids:
        if isinstance(image, bool) or not isinstance(image, ImageId):
            raise InputError(f"In the column {column!r}, {image!r} is not an image id (an integer or a string).")
    return [ids[row] for row, _ in texts]


def _ids_by_file(cells: Sequence[Cell], texts: Sequence[tuple[int, Text]]) -> list[ImageId]:
    """Return, for each text, the index of the first text with the same files and the same prompt."""
    files = [[_file_of(frame) for frame in frames_of(cell)] for cell in cells]
    first: dict[tuple[tuple[str | None, ...], str], int] = {}
    ids: list[ImageId] = []
    for index, (row, text) in enumerate(texts):
        own = files[row]
        ids.append(index if None in own or not own else first.setdefault((tuple(own), text.prompt), index))
    return ids


def _file_of(cell: ImageCell | None) -> str | None:
    """Return the path of an image that is a file, in a form that is the same for the same file."""
    return None if cell is None or cell["bytes"] is not None or not cell["path"] else os.path.normpath(cell["path"])
