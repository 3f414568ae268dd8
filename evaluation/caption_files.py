"""Files of captions: references and predictions, as COCO's JSON or as JSON lines, checked before anything is scored."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.errors import InputError

ImageId = int | str
ID_KEYS = ("image_id", "id", "file_name")
ACCEPTED = "give COCO's JSON, or JSON lines"


@dataclass
class ReferenceSet:
    """The images of a benchmark, in order, and what people wrote about them.

    Args:
        captions: the reference captions of each image.
        files: name of the image's file, where it is known.
        domains: the part of the benchmark that an image belongs to, where it has parts (NoCaps).
    """

    captions: dict[ImageId, list[str]]
    files: dict[ImageId, str] = field(default_factory=dict)
    domains: dict[ImageId, str] = field(default_factory=dict)

    @property
    def number_of_captions(self) -> int:
        return sum(map(len, self.captions.values()))

    def write(self, path: str | os.PathLike) -> None:
        """Write COCO's annotation JSON, which `read_references` and everybody else's tools read."""
        images = []
        for image in self.captions:
            entry = {"id": image}
            if image in self.files:
                entry["file_name"] = self.files[image]
            if image in self.domains:
                entry["domain"] = self.domains[image]
            images.append(entry)
        pairs = [(image, caption) for image, own in self.captions.items() for caption in own]
        annotations = [{"id": i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(pairs)]
        Path(path).write_text(json.dumps({"type": "captions", "images": images, "annotations": annotations}) + "\n")


def file_sha256(path: str | os.PathLike) -> str:
    """Fingerprint of a file, by which two scores can be told to have the same references."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_references(path: str | os.PathLike) -> ReferenceSet:
    """Read reference captions.

    Args:
        path: COCO annotation JSON (`images`, `annotations`), or a list or lines of JSON objects with an image id
            (`image_id`, `id` or `file_name`) and `captions` (or `caption`, or `references`), a string or a list.

    Raises:
        InputError: for a file that is missing, is no JSON or lacks something; the message names the first offender and
            counts all of them.
    """
    content = _read_json(path)
    if isinstance(content, dict):
        references = _from_coco(content, path)
    else:
        rows = _rows_by_id(content, path)
        captions = {}
        for image, row in rows.items():
            value = next((row[key] for key in ("references", "captions", "caption") if key in row), [])
            captions[image] = [value] if isinstance(value, str) else value
        files = {image: row["file_name"] for image, row in rows.items() if "file_name" in row}
        references = ReferenceSet(captions, files)
    captions = references.captions
    if not captions:
        raise InputError(f"{str(path)!r} holds no images: give COCO annotation JSON, or JSON lines.")
    _refuse(
        path,
        [image for image, file in references.files.items() if not isinstance(file, str)],
        lambda image: f"the file name of image {image!r} is {references.files[image]!r} and no string",
    )
    _refuse(path, [i for i, own in captions.items() if not own], lambda i: f"image {i!r} has no reference caption")
    _refuse(
        path,
        [i for i, own in captions.items() if not isinstance(own, list) or not all(isinstance(t, str) for t in own)],
        lambda i: f"the references of image {i!r} are {captions[i]!r} and not all strings",
    )
    return references


def _from_coco(content: dict, path: str | os.PathLike) -> ReferenceSet:
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise InputError(f"{str(path)!r} has no list {key!r}: give COCO annotation JSON, or JSON lines.")
    images = _rows_by_id(content["images"], path, ("id",), '{"id": 1}')
    annotations = content["annotations"]
    _refuse(
        path,
        [
            i
            for i, one in enumerate(annotations)
            if not isinstance(one, dict) or not {"image_id", "caption"} <= set(one)
        ],
        lambda i: f"annotation {i} has no 'image_id' and 'caption'",
    )
    _refuse(
        path,
        [
            one["image_id"]
            for one in annotations
            if not isinstance(one["image_id"], ImageId) or one["image_id"] not in images
        ],
        lambda image: f"an annotation is of image {image!r}, which is not among its images",
    )
    captions: dict[ImageId, list[str]] = {image: [] for image in images}
    for one in annotations:
        captions[one["image_id"]].append(one["caption"])
    files = {image: row["file_name"] for image, row in images.items() if "file_name" in row}
    domains = {image: row["domain"] for image, row in images.items() if row.get("domain") is not None}
    _refuse(
        path,
        [image for image, domain in domains.items() if not isinstance(domain, str)],
        lambda image: f"the domain of image {image!r} is {domains[image]!r} and no string",
    )
    return ReferenceSet(captions, files, domains)


def read_predictions(path: str | os.PathLike) -> dict[ImageId, str]:
    """Read one caption per image.

    Args:
        path: COCO results JSON, or lines of JSON objects, with an image id and `caption`.

    Raises:
        InputError: for a file that is missing, is no JSON or lacks something, for duplicate ids and captions that are
            no strings; the message names the first offender and counts all of them.
    """
    content = _read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{str(path)!r} holds no list of captions: give COCO results JSON, or JSON lines.")
    rows = _rows_by_id(content, path)
    _refuse(path, [i for i, row in rows.items() if "caption" not in row], lambda i: f"image {i!r} has no 'caption'")
    captions = {image: row["caption"] for image, row in rows.items()}
    _refuse(
        path,
        [i for i, caption in captions.items() if not isinstance(caption, str)],
        lambda i: f"the caption of image {i!r} is {captions[i]!r} and no string",
    )
    return captions


def write_predictions(captions: dict[ImageId, str], path: str | os.PathLike) -> None:
    """Write COCO results JSON."""
    rows = [{"image_id": image, "caption": caption} for image, caption in captions.items()]
    Path(path).write_text(json.dumps(rows) + "\n")


def in_order(
    predictions: dict[ImageId, str], references: ReferenceSet, allow_missing: bool = False, allow_empty: bool = False
) -> list[ImageId]:
    """The images to score, in the order of the references: the toolkit's tokenizer looks beyond the end of a line.

    Raises:
        InputError: for a prediction of an unknown image, and unless they are allowed an empty prediction or an image
            without one.
    """
    unknown = [image for image in predictions if image not in references.captions]
    if unknown:
        raise InputError(
            f"There is a prediction for image {unknown[0]!r}, of which there are no references ({len(unknown)} of "
            f"{len(predictions)} predictions are so). Is it the file of another data set or split? Ids must be of one "
            f"kind, too: the references' are like {next(iter(references.captions))!r}."
        )
    missing = [image for image in references.captions if image not in predictions]
    if missing and not allow_missing:
        raise InputError(
            f"There is no prediction for image {missing[0]!r} ({len(missing)} of {len(references.captions)} images are "
            f"without). Add them, or score the {len(predictions)} that have one with --allow_missing: CIDEr depends on "
            "how many images there are."
        )
    empty = [image for image, caption in predictions.items() if not caption.strip()]
    if empty and not allow_empty:
        raise InputError(
            f"The prediction for image {empty[0]!r} is empty ({len(empty)} of {len(predictions)} are). Mend them, or "
            "score them as 0 with --allow_empty."
        )
    return [image for image in references.captions if image in predictions]


def _read_json(path: str | os.PathLike) -> dict | list:
    """One JSON value, or the list of those on each line."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is no UTF-8 text ({error}): {ACCEPTED}, not compressed.") from error
    if not text.strip():
        raise InputError(f"{str(path)!r} is empty.")
    if text.lstrip()[0] not in "[{":
        raise InputError(f"{str(path)!r} is no JSON of captions: {ACCEPTED}.")
    try:
        content = json.loads(text)
        # A file of one line of JSON lines is one object, too.
        return [content] if isinstance(content, dict) and "annotations" not in content else content
    except json.JSONDecodeError as whole:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = []
        for number, line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                at = whole if number == lines[0][0] else error  # what failed on its first line is no JSON lines
                line_number = whole.lineno if at is whole else number
                raise InputError(
                    f"{str(path)!r} is no valid JSON, it may have been cut off: {at.msg} in line {line_number}, column "
                    f"{at.colno}."
                ) from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{str(path)!r} is no file of captions ({error}, line {number}).") from error
        return rows
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested as deep
        raise InputError(f"{str(path)!r} is no file of captions ({error}).") from error


def _rows_by_id(
    rows: list,
    path: str | os.PathLike,
    keys: Sequence[str] = ID_KEYS,
    example: str = '{"image_id": 1, "caption": "a dog"}',
) -> dict[ImageId, dict]:
    _refuse(
        path,
        [i for i, row in enumerate(rows) if not isinstance(row, dict) or not any(key in row for key in keys)],
        lambda i: f"entry {i} has no {' or '.join(map(repr, keys))}, as {example} has",
    )
    ids = [next(row[key] for key in keys if key in row) for row in rows]
    _refuse(
        path, [i for i in ids if isinstance(i, bool) or not isinstance(i, int | str)], lambda i: f"{i!r} is no image id"
    )
    _refuse(
        path, [i for i, count in Counter(ids).items() if count > 1], lambda i: f"image {i!r} is there more than once"
    )
    return dict(zip(ids, rows, strict=True))


def _refuse(path: str | os.PathLike, offenders: Iterable, describe: Callable[..., str]) -> None:
    if offenders := list(offenders):
        count = f" ({len(offenders)} in all)" if len(offenders) > 1 else ""
        raise InputError(f"In {str(path)!r}, {describe(offenders[0])}{count}.")
