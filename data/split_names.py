"""Splits that the names of folders, files and lists mean, such as "validation" for `val2017`."""

import os
import re
from collections.abc import Sequence

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def split_word(name: str) -> str | None:
    """Return the split that the whole name of a folder or list means: "train" for `Train` or `train2017`."""
    return SPLIT_WORDS.get(re.sub(r"[\W\d_]+$", "", name.lower()))


def splits_of_folders(paths: Sequence[object]) -> list[str]:
    """Return the split of each path by its outermost folder.

    If one of these folders is named as a split, such as `train` or `val2017`, the others are splits of their own names.
    Otherwise, and for paths without a folder, the split is "train".
    """
    outermost = [path.split("/")[0] if isinstance(path, str) and "/" in path else "" for path in paths]
    names = {folder: split_word(folder) for folder in set(outermost)}
    if not any(names.values()):
        return ["train"] * len(outermost)
    return [names[folder] or folder or "train" for folder in outermost]


def splits_of_files(files: Sequence[str]) -> dict[str, str]:
    """Return the split of each file whose name has a word for one, such as `captions_val2017.json`.

    The result is empty unless every file has such a word and no two files have the same.
    """
    splits = {file: split_of_file(file) for file in files}
    named = {file: split for file, split in splits.items() if split is not None}
    return named if len(named) == len(set(named.values())) == len(files) else {}


def split_of_file(file: str) -> str | None:
    """Return the split that words in the name of a file mean, or `None` without such words or for several splits."""
    words = set(re.findall("[a-z]+", os.path.basename(file).lower())) & SPLIT_WORDS.keys()
    splits = {SPLIT_WORDS[word] for word in words}
    return splits.pop() if len(splits) == 1 else None
