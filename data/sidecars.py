"""Captions in files with the name of the image: `dog.txt` beside `dog.jpg`, or in a folder of its own."""

import os
from collections import Counter, defaultdict
from pathlib import Path

import datasets

from .folder_files import FolderFiles
from .samples import TEXT_KINDS, caption_kinds, captions_of_text, decode_text
from .skipped_rows import SkippedRows

MAX_TEXT_BYTES = 2**20


def rows_of_sidecars(folder: str, files: FolderFiles, skipped: SkippedRows) -> tuple[datasets.Dataset, str]:
    """Return a row for each image of a folder, and a description of where their captions come from.

    Args:
        folder: the folder.
        files: its files.
        skipped: record of the texts that cannot be read or have no image.

    Returns:
        Rows with the columns `image` and `caption`. If texts of several kinds differ, each kind has a column, and
        `caption` is that of the files `.caption`. Without any text, `label` is the name of each image's own folder.
    """
    texts = texts_of_images(files)
    samples = [read_texts(folder, texts[image], skipped) for image in files.images]
    used = {file for own in texts.values() for file in own.values()}
    for file in files.others:
        if kind_of_text(file) is not None and file not in used:
            reason = "There is no image of the same name as this text, or several texts fit it."
            skipped.add("train", None, file, reason)
    columns: dict[str, list] = {"image": files.images}
    if not any(samples):
        if any(os.path.dirname(image) for image in files.images):
            columns["label"] = [os.path.basename(os.path.dirname(image)) for image in files.images]
            return datasets.Dataset.from_dict(columns), "no captions; the folders of the images are the column 'label'"
        return datasets.Dataset.from_dict(columns), "no captions (no metadata.jsonl, captions.csv or dog.txt)"
    is_readable = any(captions for sample in samples for captions in sample.values())
    kinds = caption_kinds(samples) if is_readable else TEXT_KINDS
    found = [kind for kind in TEXT_KINDS if any(kind in sample for sample in samples)]
    if len(kinds) < len(found):
        columns |= {kind: [sample.get(kind, []) for sample in samples] for kind in found}
    if kinds:
        columns["caption"] = [next(filter(None, map(sample.get, kinds)), []) for sample in samples]
    others = "".join(f"; others are the column {kind!r}" for kind in found if kind not in kinds)
    source = ", ".join(f".{kind}" for kind in kinds) or "several kinds"
    return datasets.Dataset.from_dict(columns), f"captions from files {source} beside the images{others}"


def texts_of_images(files: FolderFiles) -> dict[str, dict[str, str]]:
    """Return the texts of each image by their kind: `dog.txt` or `dog.jpg.txt` beside it, or in another folder.

    In another folder, which must not hold images, the path of a text differs in one folder: `captions/dog.txt` is
    that of `dog.jpg` or `images/dog.jpg`. Such a text is used only if no other text or image fits.

    Args:
        files: files of a folder.
    """
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files.others:
        if (kind := kind_of_text(file)) is not None:
            texts[os.path.splitext(file)[0]][kind] = file
    folders = {os.path.dirname(image) for image in files.images}
    elsewhere: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for stem in texts:
        if os.path.dirname(stem) not in folders:
            for key in without_one_folder(stem):
                elsewhere[key].add(stem)
    stems = {image: os.path.splitext(image)[0] for image in files.images}
    fitting = {
        stem: set().union(*(elsewhere.get(key, ()) for key in without_one_folder(stem))) for stem in set(stems.values())
    }
    uses = Counter(text for found in fitting.values() for text in found)
    found: dict[str, dict[str, str]] = {}
    for image, stem in stems.items():
        found[image] = {**texts.get(stem, {}), **texts.get(image, {})}
        if not found[image] and len(fitting[stem]) == 1 and uses[(only := next(iter(fitting[stem])))] == 1:
            found[image] = texts[only]
    return found


def kind_of_text(file: str) -> str | None:
    """Return the suffix of a file if it is one of texts."""
    kind = os.path.splitext(file)[1].lower()[1:]
    return kind if kind in TEXT_KINDS else None


def without_one_folder(path: str) -> list[tuple[str, ...]]:
    """Return the parts of a path, and those without each one of its folders."""
    parts = tuple(path.split("/"))
    return [parts, *(parts[:number] + parts[number + 1 :] for number in range(len(parts) - 1))]


def read_texts(folder: str, files: dict[str, str], skipped: SkippedRows) -> dict[str, list[str]]:
    """Return the captions in the texts of an image, by their kind.

    Args:
        folder: the folder.
        files: path of the text of each kind, relative to the folder.
        skipped: record of the texts that cannot be read.
    """
    captions = {}
    for kind, file in files.items():
        try:
            with (Path(folder) / file).open("rb") as opened:
                captions[kind] = captions_of_text(kind, decode_text(kind, opened.read(MAX_TEXT_BYTES)))
        except (OSError, ValueError) as error:
            skipped.add("train", None, file, f"The text cannot be read ({error}).")
            captions[kind] = []
    return captions
