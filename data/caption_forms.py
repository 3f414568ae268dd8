"""Forms in which benchmarks and tools store captions in one JSON document, as columns of rows."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..common.errors import InputError, one_line
from .captions import captions_of, describe
from .json_files import Document, columns_of
from .names import CAPTION_NAMES, ID_NAMES, IMAGE_NAMES, find_name, normal
from .skipped_rows import SkippedRows
from .split_names import split_word
from .text_files import Columns


@dataclass(frozen=True)
class VizWizRules:
    """Rules of VizWiz about captions that its own evaluation leaves out.

    Args:
        ignore_rejected: leave out captions that were rejected as spam (`is_rejected`).
        ignore_precanned: leave out ready-made captions about the quality of the image (`is_precanned`).

    Example:

    ```python
    >>> VizWizRules(ignore_precanned=False).mark_of({"caption": "asdf", "is_rejected": True})
    'is_rejected'
    ```
    """

    ignore_rejected: bool = True
    ignore_precanned: bool = True

    def mark_of(self, annotation: dict[str, Any]) -> str | None:
        """Return the mark because of which a caption is left out, or `None`."""
        ignored = {"is_rejected": self.ignore_rejected, "is_precanned": self.ignore_precanned}
        return next((mark for mark, is_ignored in ignored.items() if is_ignored and annotation.get(mark)), None)


def read_form(document: Document, name: str, rules: VizWizRules, skipped: SkippedRows) -> Columns:
    """Return the rows of a JSON document as columns.

    Args:
        document: COCO's annotations (also VizWiz, NoCaps), Karpathy's splits, TextCaps, captions or rows by image,
            or a single row. An object may also hold columns, one list of rows, or a list for each split.
        name: the file, for messages.
        rules: rules for the captions of VizWiz.
        skipped: record of the captions that these rules leave out.

    Returns:
        The columns `image` (a path, or `None`) and `caption`. Forms that have them also give `image_id`, `split` and
        `domain`. A list of rows keeps its own columns.

    Raises:
        InputError: if the document has no known form, or an entry does not have the fields of its form.
    """
    lists = {key: value for key, value in document.items() if value and is_list_of_rows(value)}
    if "images" in lists and any("sentences" in image for image in lists["images"]):
        return karpathy_columns(lists["images"], name)
    if isinstance(document.get("images"), list) and isinstance(document.get("annotations"), list):
        return coco_columns(document["images"], document["annotations"], name, rules, skipped)
    if "data" in lists and any("reference_strs" in row for row in lists["data"]):
        return textcaps_columns(lists["data"], name)
    if (columns := columns_in(document, name)) is not None:
        return columns
    if has_image(document) and (find_name(CAPTION_NAMES, document) is not None or not lists):
        return columns_of([document], name)  # one row
    if len(lists) == 1 and all(map(has_image, rows := next(iter(lists.values())))):
        return columns_of(rows, name)
    if lists and all((split_word(key) is not None) == is_list_of_rows(value) for key, value in document.items()):
        rows = [{**row, "split": split_word(key)} for key, part in lists.items() for row in part]
        return columns_of(rows, name)
    if not has_image(document) and find_name(CAPTION_NAMES, document) is None:
        captions = [captions_of(value) if isinstance(value, str | list) else [] for value in document.values()]
        if captions and all(captions):
            return {"image": list(document), "image_id": list(document), "caption": captions}
        if document and all(map(is_captioned, document.values())):
            return columns_of([{"image": key, **row} for key, row in document.items()], name)
    keys = ", ".join(repr(key[:40]) for key in list(document)[:8])
    raise InputError(
        f"The file {name!r} holds a JSON object with {keys or 'nothing'}, which is not a known form of captions: give "
        "a list of rows, or COCO's annotations."
    )


def has_image(row: dict[str, Any]) -> bool:
    """Return whether an object names an image, by a file or by an id."""
    return any(normal(key) in IMAGE_NAMES + ID_NAMES for key in row)


def is_list_of_rows(value: Any) -> bool:
    """Return whether a value is a list of dicts."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def is_captioned(value: Any) -> bool:
    """Return whether a value is a dict with a caption."""
    return isinstance(value, dict) and find_name(CAPTION_NAMES, value) is not None


def columns_in(document: Document, name: str) -> Columns | None:
    """Return the columns of a document that stores lists or, as pandas does, objects by row number.

    Raises:
        InputError: if the columns of images and captions have different lengths.
    """
    image = find_name(IMAGE_NAMES, document)
    caption = find_name(CAPTION_NAMES, document)
    if image is None or caption is None or not isinstance(document[image], list | dict):
        return None
    by_number = isinstance(document[image], dict)
    rows = list(document[image])
    columns = {key: value for key, value in document.items() if isinstance(value, type(document[image]))}
    if caption in columns and (list(columns[caption]) == rows if by_number else len(columns[caption]) == len(rows)):
        return {
            key: [value[row] for row in rows] if by_number else value
            for key, value in columns.items()
            if len(value) == len(rows) and (not by_number or value.keys() == document[image].keys())
        }
    raise InputError(f"In {name[-150:]!r}, the columns {image!r} and {caption!r} do not have the same rows.")


# ----------------------------------------------------------------------------------------------------------------------
# COCO, VizWiz, NoCaps
# ----------------------------------------------------------------------------------------------------------------------


def coco_columns(images: list, annotations: list, name: str, rules: VizWizRules, skipped: SkippedRows) -> Columns:
    """Gather the captions of each image of COCO's annotations."""
    without_id = (n for n, image in enumerate(images) if not isinstance(image, dict) or not is_id(image.get("id")))
    refuse(name, without_id, lambda n: f'image {n} has no valid id, as in {{"id": 1, "file_name": "a.jpg"}}')
    refuse(name, repeated(image["id"] for image in images), lambda image: f"image {image!r} occurs more than once")
    captions: dict[int | str, list] = {image["id"]: [] for image in images}
    files = {image["id"]: image.get("file_name") for image in images}
    refuse(
        name,
        (image for image, file in files.items() if not isinstance(file, str | None)),
        lambda image: f"the file name of image {image!r} is {files[image]!r}, which is not a string",
    )
    without_caption = [n for n, a in enumerate(annotations) if not isinstance(a, dict) or "caption" not in a]
    if annotations and len(without_caption) == len(annotations):
        raise InputError(f"The file {name!r} holds no captions: its annotations are {describe(annotations)}.")
    refuse(name, without_caption, lambda number: f"annotation {number} has no 'caption'")
    refuse(
        name,
        (n for n, a in enumerate(annotations) if not is_id(a.get("image_id")) or a["image_id"] not in captions),
        lambda number: (
            f"annotation {number} is of image {annotations[number].get('image_id')!r}, which is not among its images"
        ),
    )
    for number, annotation in enumerate(annotations):
        image = annotation["image_id"]
        if (mark := rules.mark_of(annotation)) is None:
            captions[image].append(annotation["caption"])
        else:
            reason = f"a caption is left out, because VizWiz marks it as {mark}"
            skipped.add("train", None, files[image], reason, place=number)
    columns = {"image": list(files.values()), "image_id": list(captions), "caption": list(captions.values())}
    for key in ("split", "domain"):
        if any(image.get(key) is not None for image in images):
            columns[key] = [image.get(key) for image in images]
    return columns


# ----------------------------------------------------------------------------------------------------------------------
# Other benchmarks
# ----------------------------------------------------------------------------------------------------------------------


def karpathy_columns(images: list[dict[str, Any]], name: str) -> Columns:
    """Return the images of Karpathy's splits. The split "restval" becomes part of "train", as is usual."""
    incomplete = (n for n, image in enumerate(images) if not {"filename", "sentences"} <= image.keys())
    refuse(name, incomplete, lambda number: f"image {number} has no 'filename' or no 'sentences'")
    splits = [image.get("split") for image in images]
    return {
        "image": [os.path.join(str(image.get("filepath") or ""), str(image["filename"])) for image in images],
        "image_id": [image.get("cocoid", image.get("imgid", image["filename"])) for image in images],
        "caption": [captions_of(image["sentences"]) for image in images],
        "split": ["train" if split == "restval" else split for split in splits],
    }


def textcaps_columns(rows: list[dict[str, Any]], name: str) -> Columns:
    """Gather the captions of each image of TextCaps, which has a row for each caption."""
    refuse(name, (n for n, row in enumerate(rows) if "image_id" not in row), lambda n: f"row {n} has no 'image_id'")
    captions: dict[Any, dict[str, None]] = {}
    first_rows: dict[Any, dict[str, Any]] = {}
    for row in rows:
        first_rows.setdefault(row["image_id"], row)
        texts = row.get("reference_strs") or row.get("caption_str")
        captions.setdefault(row["image_id"], {}).update(dict.fromkeys(captions_of(texts)))
    paths = [row.get("image_path") or row.get("image_name") or row["image_id"] for row in first_rows.values()]
    columns = {"image": paths, "image_id": list(captions), "caption": list(map(list, captions.values()))}
    if all("set_name" in row for row in first_rows.values()):
        columns["split"] = [row["set_name"] for row in first_rows.values()]
    return columns


# ----------------------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------------------


def is_id(value: object) -> bool:
    """Return whether a value can identify an image: an integer or a string."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def repeated(values: Iterable) -> list:
    """Return the values that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def refuse(name: str, offenders: Iterable, describe_one: Callable[[Any], str]) -> None:
    """Raise an error that names the first offender and counts all.

    Args:
        name: the file.
        offenders: entries that cannot be used. Without any, no error is raised.
        describe_one: function that says what is wrong with an offender.
    """
    if offenders := list(offenders):
        count = f" ({len(offenders)} in all)" if len(offenders) > 1 else ""
        raise InputError(f"In {name[-150:]!r}, {one_line(describe_one(offenders[0]), 250)}{count}.")
