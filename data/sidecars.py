"""Captions in files beside images, with the name of the image: `dog.txt` beside `dog.jpg`."""

import os
from collections import defaultdict
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
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for file in files.others:
        stem, suffix = os.path.splitext(file)
        if suffix.lower()[1:] in TEXT_KINDS:
            texts[stem][suffix.lower()[1:]] = file
    names = {image: (os.path.splitext(image)[0], image) for image in files.images}  # dog.txt or dog.jpg.txt
    samples = [
        read_texts(folder, {kind: file for name in names[image] for kind, file in texts.get(name, {}).items()}, skipped)
        for image in files.images
    ]
    columns: dict[str, list] = {"image": files.images}
    if not any(samples):
        if any(os.path.dirname(image) for image in files.images):
            columns["label"] = [os.path.basename(os.path.dirname(image)) for image in files.images]
            return datasets.Dataset.from_dict(columns), "no captions; the folders of the images are the column 'label'"
        return datasets.Dataset.from_dict(columns), "no captions (no metadata.jsonl, captions.csv or dog.txt)"
    for stem in sorted(texts.keys() - {name for both in names.values() for name in both}):
        for file in texts[stem].values():
            skipped.add("train", None, file, "There is no image of the same name as this text.")
    kinds = caption_kinds(samples)
    found = [kind for kind in TEXT_KINDS if any(kind in sample for sample in samples)]
    if len(kinds) < len(found):
        columns |= {kind: [sample.get(kind, []) for sample in samples] for kind in found}
    if kinds:
        columns["caption"] = [next(filter(None, map(sample.get, kinds)), []) for sample in samples]
    others = "".join(f"; others are the column {kind!r}" for kind in found if kind not in kinds)
    source = ", ".join(f".{kind}" for kind in kinds) or "several kinds"
    return datasets.Dataset.from_dict(columns), f"captions from files {source} beside the images{others}"


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
