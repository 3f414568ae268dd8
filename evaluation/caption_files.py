"""Files of references and predictions in every form that training reads, checked before scoring."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..common.logging import get_logger
from ..data.caption_forms import VizWizRules, is_id, refuse
from ..data.captions import parse_list, texts_of
from ..data.conversations import CONVERSATION_NAMES, rounds_of
from ..data.names import CAPTION_NAMES, IMAGE_NAMES, find_name
from ..data.skipped_rows import SkippedRows
from ..data.text_files import Columns
from ..data.text_rows import TEXT_SUFFIXES, read_columns

logger = get_logger(__name__)

ImageId = int | str
Keys = Callable[[ImageId, str | None], Iterable]  # from the id and the file of an image to the texts that identify it
REMEDY = "give rows with image_id and caption, or COCO's JSON"


@dataclass
class ReferenceSet:
    """Reference captions of images, in order.

    Args:
        captions: the reference captions of each image.
        files: the file name of each image, if known.
        domains: the domain of each image, for benchmarks with domains (NoCaps).
        splits: the split of each image, for files that hold several (Karpathy's).
        ignored: images of which the file leaves out all captions (VizWiz). They are not scored.
    """

    captions: dict[ImageId, list[str]]
    files: dict[ImageId, str] = field(default_factory=dict)
    domains: dict[ImageId, str] = field(default_factory=dict)
    splits: dict[ImageId, str] = field(default_factory=dict)
    ignored: frozenset[ImageId] = frozenset()

    @property
    def num_captions(self) -> int:
        return sum(map(len, self.captions.values()))

    def select(self, images: Sequence[ImageId]) -> "ReferenceSet":
        """Return the references of some of the images, in the order of `images`."""
        return ReferenceSet(
            {image: self.captions[image] for image in images},
            {image: self.files[image] for image in images if image in self.files},
            {image: self.domains[image] for image in images if image in self.domains},
            {image: self.splits[image] for image in images if image in self.splits},
        )

    def write(self, path: str | os.PathLike) -> None:
        """Write COCO annotation JSON, which `read_references` and other tools read.

        Args:
            path: the file to write.
        """
        images: list[dict[str, Any]] = []
        for image in self.captions:
            entry: dict[str, Any] = {"id": image}
            if image in self.files:
                entry["file_name"] = self.files[image]
            if image in self.domains:
                entry["domain"] = self.domains[image]
            images.append(entry)
        pairs = [(image, caption) for image, captions in self.captions.items() for caption in captions]
        annotations = [{"id": i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(pairs)]
        Path(path).write_text(json.dumps({"type": "captions", "images": images, "annotations": annotations}) + "\n")


def file_sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, to check whether two scores have the same references."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Rows of files
# ----------------------------------------------------------------------------------------------------------------------


def read_rows(path: str | os.PathLike, rules: VizWizRules, skipped: SkippedRows) -> Columns:
    """Read the columns of a file in every form that training reads.

    Raises:
        InputError: for a file that does not exist, is not valid, or is of another kind.
    """
    if not Path(path).is_file():
        raise InputError(f"There is no file {str(path)!r}.")
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix not in TEXT_SUFFIXES:
        raise InputError(f"{str(path)!r} is not a file of captions: {REMEDY}, not compressed.")
    return read_columns(str(path), rules, skipped)


def read_parquet(path: str | os.PathLike) -> Columns:
    """Read the columns of a parquet file that hold strings, numbers or lists, which leaves out stored images."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(path)
        names = [f.name for f in schema if not pa.types.is_struct(f.type) and not pa.types.is_binary(f.type)]
        return parquet.read_table(path, columns=names).to_pydict()
    except pa.ArrowException as error:
        raise InputError(f"{str(path)!r} is not a valid parquet file ({str(error)[:200]}).") from error


def ids_of(columns: Columns, path: str | os.PathLike) -> tuple[list[Any], list[Any]]:
    """Return the id and the file of the image of each row. Without a column of files, the files are `None`.

    Raises:
        InputError: if no column holds ids or files of images.
    """
    number = max(map(len, columns.values()), default=0)
    image_column = find_name(IMAGE_NAMES, columns)
    files = columns[image_column] if image_column is not None else [None] * number
    # An `id` may count captions. It identifies images only if they do not repeat.
    counts_captions = image_column is not None and len(set(map(str, files))) < number
    candidates = ("image_id", None if counts_captions else "id", image_column)
    column = next((name for name in candidates if name in columns), None)
    if column is None:
        names = ", ".join(repr(name[:40]) for name in list(columns)[:8])
        raise InputError(
            f"In {str(path)[-150:]!r}, entry 0 has no 'image_id' or name of an image, as in "
            f'{{"image_id": 1, "caption": "a dog"}}; it has {names or "nothing"}.'
        )
    ids = columns[column]
    refuse(str(path), (n for n, i in enumerate(ids) if i is None), lambda n: f"entry {n} has no {column!r}")
    refuse(str(path), (i for i in ids if not is_id(i)), lambda i: f"{i!r} is not an image id (an integer or a string)")
    return ids, files


def captions_in(columns: Columns, path: str | os.PathLike, first: Sequence[str] = ()) -> list[Any]:
    """Return the cell of captions of each row.

    Args:
        columns: the columns.
        path: the file, for messages.
        first: names to prefer to the usual ones.

    Raises:
        InputError: if no column holds captions.
    """
    name = next((name for name in first if name in columns), None) or find_name(CAPTION_NAMES, columns)
    if name is None and (name := next((each for each in CONVERSATION_NAMES if each in columns), None)) is not None:
        rounds = [list(rounds_of(cell)) for cell in columns[name]]
        refuse(
            str(path),
            (number for number, own in enumerate(rounds) if len(own) > 1),
            lambda number: f"the conversation of entry {number} has several prompts: score it with --dataset_name",
        )
        return [own[0][1] if own else None for own in rounds]
    if name is None:
        names = ", ".join(repr(name[:40]) for name in list(columns)[:8])
        raise InputError(f"In {str(path)[-150:]!r}, entry 0 has no 'caption'; it has {names}.")
    return columns[name]


def cell_texts(cell: Any) -> Any:
    """Return the captions of a cell unchanged, blank ones included, or the cell itself if it holds something else."""
    value = parse_list(cell) if isinstance(cell, str) else cell
    if value is None or isinstance(value, str):
        return [] if value is None else [value]
    items = value if isinstance(value, list) else [value]
    texts = [text for item in items for text in (texts_of(item) if isinstance(item, dict) else [item])]
    return texts if texts or not items else value


# ----------------------------------------------------------------------------------------------------------------------
# References
# ----------------------------------------------------------------------------------------------------------------------


def read_references(path: str | os.PathLike, rules: VizWizRules | None = None) -> ReferenceSet:
    """Read reference captions.

    Args:
        path: a file in any form that training reads: COCO's annotations, Karpathy's splits, TextCaps, captions by
            image, or rows. Rows have an image id or file, and a string or list as `references` or `caption`. Rows of
            the same image are merged.
        rules: rules for the captions of VizWiz.

    Raises:
        InputError: for a file that does not exist, is not valid or lacks a field. The message names the first invalid
            entry and counts all of them.

    Example:

    ```python
    >>> references = read_references("annotations/captions_val2014.json")  # doctest: +SKIP
    >>> references.captions[391895]  # doctest: +SKIP
    ['A man with a red helmet on a small moped on a dirt road. ', ...]
    ```
    """
    name, skipped = str(path), SkippedRows()
    columns = read_rows(path, rules or VizWizRules(), skipped)
    if not any(columns.values()):
        raise InputError(f"{name!r} holds no images: {REMEDY}.")
    ids, files = ids_of(columns, path)
    captions: dict[ImageId, list[str]] = {}
    for image, cell in zip(ids, captions_in(columns, path, ("references", "captions")), strict=True):
        texts = cell_texts(cell)
        known = captions.setdefault(image, [])
        known.extend(texts if isinstance(texts, list) else [texts])
    refuse(
        name,
        (image for image, texts in captions.items() if not all(isinstance(text, str) for text in texts)),
        lambda image: f"the references of image {image!r} are {captions[image]!r}, which are not all strings",
    )
    ignored = frozenset(image for image, texts in captions.items() if not texts) if skipped.pending else frozenset()
    refuse(
        name,
        (image for image, texts in captions.items() if not texts and image not in ignored),
        lambda image: f"image {image!r} has no reference caption",
    )
    if skipped.pending:
        logger.info("VizWiz's rules leave out %d captions and %d images of %r.", len(skipped), len(ignored), name)
    domains, splits = (of_images(ids, columns.get(column, [])) for column in ("domain", "split"))
    found = ReferenceSet(captions, of_images(ids, files), domains, splits)
    for image, domain in found.domains.items():
        if not isinstance(domain, str):
            raise InputError(f"In {name!r}, the domain of image {image!r} is {domain!r}, which is not a string.")
    scored = found.select([image for image in captions if image not in ignored])
    scored.ignored = ignored
    return scored


def of_images(ids: list[ImageId], values: list) -> dict[ImageId, Any]:
    """Return the value of each image that has one, that of its first row."""
    pairs = zip(reversed(ids), reversed(values), strict=False) if len(values) == len(ids) else ()
    return {image: value for image, value in pairs if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Predictions
# ----------------------------------------------------------------------------------------------------------------------


def read_predictions(path: str | os.PathLike) -> dict[ImageId, str]:
    """Read one caption for each image.

    Args:
        path: a file in any form that training reads, such as COCO's results, rows with an image id or file and
            `caption`, or captions by image.

    Raises:
        InputError: for a file that does not exist, is not valid or lacks a field, and for an image that occurs twice.
            The message names the first invalid entry and counts all of them.
    """
    name = str(path)
    columns = read_rows(path, VizWizRules(), SkippedRows())
    ids, _ = ids_of(columns, path)
    cells = captions_in(columns, path)
    refuse(
        name,
        (image for image, count in Counter(ids).items() if count > 1),
        lambda image: f"image {image!r} occurs more than once",
    )
    texts = {image: cell_texts(cell) for image, cell in zip(ids, cells, strict=True)}
    cell_of = dict(zip(ids, cells, strict=True))
    refuse(
        name,
        (image for image, found in texts.items() if isinstance(found, list) and len(found) > 1),
        lambda image: f"image {image!r} has {len(texts[image])} captions, but one is scored",
    )
    captions = {image: found[0] if isinstance(found, list) and found else None for image, found in texts.items()}
    refuse(
        name,
        (image for image, caption in captions.items() if not isinstance(caption, str)),
        lambda image: f"the caption of image {image!r} is {cell_of[image]!r}, which is not a string",
    )
    return {image: str(caption) for image, caption in captions.items()}


def write_predictions(captions: dict[ImageId, str], path: str | os.PathLike) -> None:
    """Write COCO results JSON.

    Args:
        captions: the caption of each image.
        path: the file to write.
    """
    rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    Path(path).write_text(json.dumps(rows) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Predictions and references together
# ----------------------------------------------------------------------------------------------------------------------


def join(predictions: dict[ImageId, str], references: ReferenceSet) -> tuple[dict[ImageId, str], ReferenceSet]:
    """Return the predictions by the ids of the references, and the references of the splits that they belong to.

    Ids are compared as they are. If none is the same, they are compared as text, then by the name of the file. The last
    way is the number in that name. Predictions for images that the references leave out are left out.

    Args:
        predictions: the caption of each image.
        references: the reference captions, with the names of the files if they are known.

    Raises:
        InputError: if no prediction is of an image of the references.

    Example:

    ```python
    >>> join({"photos/1.jpg": "a dog"}, ReferenceSet({7: ["a dog runs"]}, {7: "1.jpg"}))[0]
    {7: 'a dog'}
    ```
    """
    for keys in WAYS_TO_JOIN:
        image_of = join_in_one_way(predictions, references, keys)
        joined = [image for image in image_of.values() if image is not None]
        if joined and len(set(joined)) == len(joined):
            break
    else:
        first, other = next(iter(predictions), None), next(iter(references.captions), None)
        raise InputError(
            f"No prediction is of an image of the references: an image of the predictions is {str(first)[:100]!r}, one "
            f"of the references is {str(other)[:100]!r}. Check that both files are of the same data set and split."
        )
    captions = {own if image is None else image: predictions[own] for own, image in image_of.items()}
    captions = {image: caption for image, caption in captions.items() if image not in references.ignored}
    splits = {references.splits.get(image) for image in captions} - {None}
    if splits:
        in_splits = [image for image in references.captions if references.splits.get(image) in splits]
        logger.info("Scoring the images of the splits %s.", ", ".join(sorted(map(str, splits))))
        references = references.select(in_splits)
    return captions, references


def join_in_one_way(
    predictions: Iterable[ImageId], references: ReferenceSet, keys: Keys
) -> dict[ImageId, ImageId | None]:
    """Return the image of the references that has the same key as each prediction, or `None` if it is not unique.

    Args:
        predictions: the ids of the predictions.
        references: the references.
        keys: function that yields the keys of an image.
    """
    images: dict[Any, set[ImageId]] = {}
    for image in (*references.captions, *references.ignored):
        for key in keys(image, references.files.get(image)):
            images.setdefault(key, set()).add(image)
    found = {own: [images[key] for key in keys(own, None) if len(images.get(key, ())) == 1] for own in predictions}
    return {own: next(iter(first[0])) if first else None for own, first in found.items()}


def same_id(image: ImageId, file: str | None) -> Iterator[ImageId]:
    """Yield the id itself."""
    yield image


def id_as_text(image: ImageId, file: str | None) -> Iterator[str]:
    """Yield the id as text."""
    yield str(image)


def file_names(image: ImageId, file: str | None) -> Iterator[str]:
    """Yield the names of the file that an image may have, with and without its suffix."""
    for text in (str(image), file):
        if text is not None:
            name = re.split(r"[/\\\\]", text)[-1]
            yield from (name, os.path.splitext(name)[0])


def file_numbers(image: ImageId, file: str | None) -> Iterator[int]:
    """Yield the number at the end of the file's name: 42 of `COCO_val2014_000000000042.jpg`."""
    for name in file_names(image, file):
        if number := re.fullmatch(r"(?:.*\D)?(\d{1,18})", name):
            yield int(number[1])


WAYS_TO_JOIN: tuple[Keys, ...] = (same_id, id_as_text, file_names, file_numbers)


def images_to_score(
    predictions: dict[ImageId, str], references: ReferenceSet, allow_missing: bool = False, allow_empty: bool = False
) -> list[ImageId]:
    """Return the images to score in the order of the references.

    The order matters, because the toolkit's tokenizer may read the first word of the next caption.

    Args:
        predictions: the caption of each image.
        references: the reference captions.
        allow_missing: leave out images without a prediction.
        allow_empty: accept empty predictions.

    Raises:
        InputError: for a prediction of an unknown image, an image without a prediction, or an empty prediction.
    """
    unknown = [image for image in predictions if image not in references.captions]
    if unknown:
        raise InputError(
            f"The prediction for image {unknown[0]!r} has no references ({len(unknown)} of {len(predictions)} "
            "predictions have none). Check that both files are of the same data set and split, and that their ids have "
            f"the same form: an id of the references is {next(iter(references.captions))!r}."
        )
    missing = [image for image in references.captions if image not in predictions]
    if missing and not allow_missing:
        raise InputError(
            f"There is no prediction for image {missing[0]!r} ({len(missing)} of {len(references.captions)} images "
            f"have no prediction). Add them, or score the other {len(predictions)} images with --allow_missing; CIDEr "
            "depends on the number of images."
        )
    empty = [image for image, caption in predictions.items() if not caption.strip()]
    if empty and not allow_empty:
        raise InputError(
            f"The prediction for image {empty[0]!r} is empty ({len(empty)} of {len(predictions)} are). Fill them in, "
            "or score them as 0 with --allow_empty."
        )
    return [image for image in references.captions if image in predictions]
