"""Files of references and predictions, as COCO's JSON or as JSON lines, checked before scoring."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import InputError, one_line

ImageId = int | str
ID_KEYS = ("image_id", "id", "file_name")
REFERENCE_KEYS = ("references", "captions", "caption")
REMEDY = "give COCO's JSON, or JSON lines"


@dataclass
class ReferenceSet:
    """Reference captions of images, in order.

    Args:
        captions: the reference captions of each image.
        files: the file name of each image, if known.
        domains: the domain of each image, for benchmarks with domains (NoCaps).
    """

    captions: dict[ImageId, list[str]]
    files: dict[ImageId, str] = field(default_factory=dict)
    domains: dict[ImageId, str] = field(default_factory=dict)

    @property
    def num_captions(self) -> int:
        return sum(map(len, self.captions.values()))

    def select(self, images: Sequence[ImageId]) -> "ReferenceSet":
        """Return the references of some of the images, in the order of `images`."""
        return ReferenceSet(
            {image: self.captions[image] for image in images},
            {image: self.files[image] for image in images if image in self.files},
            {image: self.domains[image] for image in images if image in self.domains},
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
# References
# ----------------------------------------------------------------------------------------------------------------------


def read_references(path: str | os.PathLike) -> ReferenceSet:
    """Read reference captions.

    Args:
        path: COCO annotation JSON (`images`, `annotations`), or a list or lines of JSON objects. Each object has an
            image id (`image_id`, `id` or `file_name`), and a string or a list of strings as `references`, `captions` or
            `caption`.

    Raises:
        InputError: for a file that does not exist, is not valid JSON or lacks a field. The message names the first
            invalid entry and counts all of them.

    Example:

    ```python
    >>> references = read_references("annotations/captions_val2014.json")  # doctest: +SKIP
    >>> references.captions[391895]  # doctest: +SKIP
    ['A man with a red helmet on a small moped on a dirt road. ', ...]
    ```
    """
    content = _read_json(path)
    references = _coco_references(content, path) if isinstance(content, dict) else _row_references(content, path)
    captions, files, domains = references.captions, references.files, references.domains
    if not captions:
        raise InputError(f"{str(path)!r} holds no images: give COCO annotation JSON, or JSON lines.")
    _refuse(
        path,
        [image for image, name in files.items() if not isinstance(name, str)],
        lambda image: f"the file name of image {image!r} is {files[image]!r}, which is not a string",
    )
    _refuse(
        path,
        [image for image, domain in domains.items() if not isinstance(domain, str)],
        lambda image: f"the domain of image {image!r} is {domains[image]!r}, which is not a string",
    )
    _refuse(
        path,
        [image for image, texts in captions.items() if not texts],
        lambda image: f"image {image!r} has no reference caption",
    )
    _refuse(
        path,
        [image for image, texts in captions.items() if not _is_list_of_strings(texts)],
        lambda image: f"the references of image {image!r} are {captions[image]!r}, which are not all strings",
    )
    return references


def _row_references(rows: list, path: str | os.PathLike) -> ReferenceSet:
    """Return the references in rows with an image id and captions."""
    row_of = _rows_by_id(rows, path)
    captions: dict[ImageId, list[str]] = {}
    for image, row in row_of.items():
        value: Any = next((row[key] for key in REFERENCE_KEYS if key in row), [])
        captions[image] = [value] if isinstance(value, str) else value
    return ReferenceSet(captions, _present(row_of, "file_name"))


def _coco_references(content: dict, path: str | os.PathLike) -> ReferenceSet:
    """Return the references in COCO annotation JSON."""
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise InputError(f"{str(path)!r} has no list {key!r}: give COCO annotation JSON, or JSON lines.")
    row_of = _rows_by_id(content["images"], path, ("id",), '{"id": 1}')
    annotations = content["annotations"]
    _refuse(
        path,
        [
            i
            for i, row in enumerate(annotations)
            if not isinstance(row, dict) or not {"image_id", "caption"} <= set(row)
        ],
        lambda i: f"annotation {i} has no 'image_id' and 'caption'",
    )
    _refuse(
        path,
        [row["image_id"] for row in annotations if not _is_id(row["image_id"]) or row["image_id"] not in row_of],
        lambda image: f"an annotation is of image {image!r}, which is not among its images",
    )
    captions: dict[ImageId, list[str]] = {image: [] for image in row_of}
    for row in annotations:
        captions[row["image_id"]].append(row["caption"])
    domains = {image: domain for image, domain in _present(row_of, "domain").items() if domain is not None}
    return ReferenceSet(captions, _present(row_of, "file_name"), domains)


# ----------------------------------------------------------------------------------------------------------------------
# Predictions
# ----------------------------------------------------------------------------------------------------------------------


def read_predictions(path: str | os.PathLike) -> dict[ImageId, str]:
    """Read one caption for each image.

    Args:
        path: COCO results JSON, or lines of JSON objects, with an image id and `caption`.

    Raises:
        InputError: for a file that does not exist, is not valid JSON or lacks a field, and for an id that occurs twice.
            The message names the first invalid entry and counts all of them.
    """
    content = _read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{str(path)!r} does not hold a list of captions: give COCO results JSON, or JSON lines.")
    row_of = _rows_by_id(content, path)
    _refuse(
        path,
        [image for image, row in row_of.items() if "caption" not in row],
        lambda image: f"image {image!r} has no 'caption'",
    )
    captions = {image: row["caption"] for image, row in row_of.items()}
    _refuse(
        path,
        [image for image, caption in captions.items() if not isinstance(caption, str)],
        lambda image: f"the caption of image {image!r} is {captions[image]!r}, which is not a string",
    )
    return captions


def write_predictions(captions: dict[ImageId, str], path: str | os.PathLike) -> None:
    """Write COCO results JSON.

    Args:
        captions: the caption of each image.
        path: the file to write.
    """
    rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    Path(path).write_text(json.dumps(rows) + "\n")


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


# ----------------------------------------------------------------------------------------------------------------------
# JSON
# ----------------------------------------------------------------------------------------------------------------------


def _read_json(path: str | os.PathLike) -> dict | list:
    """Return the JSON value of a file, or the list of the values on its lines."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text ({error}): {REMEDY}, not compressed.") from error
    if not text.strip():
        raise InputError(f"{str(path)!r} is empty.")
    if text.lstrip()[0] not in "[{":
        raise InputError(f"{str(path)!r} does not hold JSON of captions: {REMEDY}.")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        return _parse_json_lines(text, path, error)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of nested brackets
        raise InputError(f"{str(path)!r} is not a file of captions ({error}).") from error
    # A JSON-lines file with one line is also a JSON object.
    return [content] if isinstance(content, dict) and "annotations" not in content else content


def _parse_json_lines(text: str, path: Path, error_of_whole: json.JSONDecodeError) -> list:
    """Return the values on the lines of a text.

    Args:
        text: the content of the file.
        path: the file, for messages.
        error_of_whole: error of parsing the text as one JSON value, which explains more than the error of the first
            line.
    """
    rows: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            cause, line_number = (error, number) if rows else (error_of_whole, error_of_whole.lineno)
            raise InputError(
                f"{str(path)!r} is not valid JSON and may have been cut off: {cause.msg} in line {line_number}, column "
                f"{cause.colno}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} is not a file of captions ({error}, line {number}).") from error
    return rows


def _rows_by_id(
    rows: list,
    path: str | os.PathLike,
    keys: Sequence[str] = ID_KEYS,
    example: str = '{"image_id": 1, "caption": "a dog"}',
) -> dict[ImageId, dict]:
    """Return the rows by image id, and check the ids.

    Args:
        rows: objects that have an image id.
        path: the file, for messages.
        keys: keys that may hold the id; the first key that a row has is used.
        example: a valid row, for messages.
    """
    _refuse(
        path,
        [i for i, row in enumerate(rows) if not isinstance(row, dict) or not any(key in row for key in keys)],
        lambda i: f"entry {i} has no {' or '.join(map(repr, keys))}, as in {example}",
    )
    ids = [next(row[key] for key in keys if key in row) for row in rows]
    _refuse(path, [i for i in ids if not _is_id(i)], lambda i: f"{i!r} is not an image id (an integer or a string)")
    _refuse(path, [i for i, count in Counter(ids).items() if count > 1], lambda i: f"image {i!r} occurs more than once")
    return dict(zip(ids, rows, strict=True))


def _present(row_of: dict[ImageId, dict], key: str) -> dict[ImageId, Any]:
    """Return the value of a key for each row that has it."""
    return {image: row[key] for image, row in row_of.items() if key in row}


def _is_id(value: object) -> bool:
    return isinstance(value, ImageId) and not isinstance(value, bool)


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _refuse(path: str | os.PathLike, offenders: Iterable, describe: Callable[..., str]) -> None:
    if offenders := list(offenders):
        count = f" ({len(offenders)} in all)" if len(offenders) > 1 else ""
        raise InputError(f"In {str(path)!r}, {one_line(describe(offenders[0]), 300)}{count}.")
