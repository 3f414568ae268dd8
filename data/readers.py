"""TODO."""

import glob
import json
import os
import re
from pathlib import Path

import datasets

from ..common.errors import InputError

# What `datasets` reads a file with. In a CSV file nothing but text is meant: "NA" may be a caption.
READERS = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".tar": ("webdataset", {}),
}


MOST_COLUMNS, DEEPEST = 1000, 1000  # of a file of rows: columns, and brackets within brackets


Rows = datasets.Dataset | datasets.IterableDataset


def find_files(name: str) -> list[str]:
    """The files that a name stands for, in order; none if it is a folder, or a data set on the Hub.

    Raises:
        InputError: if one is not there.
    """
    if os.path.isdir(name):
        return []
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        first, last = numbers.groups()
        names = [
            f"{name[: numbers.start()]}{number:0{len(first)}}{name[numbers.end() :]}"
            for number in range(int(first), int(last) + 1)
        ]
        return [file for each in names for file in find_files(each)]
    if os.path.isfile(name) or "://" in name:
        return [name]
    files = sorted(glob.glob(name, recursive=True))
    if not files and (glob.has_magic(name) or Path(name).suffix in READERS):
        raise InputError(f"There is no file {name!r}.")
    return files


def read_files(files: list[str], streaming: bool) -> dict[str, Rows]:
    """All rows of files of one kind."""
    kinds = {Path(file).suffix for file in files}
    if len(kinds) > 1 or kinds - set(READERS):
        raise InputError(
            f"Files of rows are {', '.join(READERS)}, all of one kind, and not {', '.join(sorted(kinds)) or 'nothing'}."
        )
    if kinds == {".json"} and len(files) == 1 and (rows := read_coco(files[0])) is not None:
        return {"train": rows.to_iterable_dataset() if streaming else rows}
    reader, options = READERS[kinds.pop()]
    found = list(map(glob.escape, files))  # datasets takes names for patterns
    return dict(datasets.load_dataset(reader, data_files={"train": found}, streaming=streaming, **options))


def check_text(file: str | os.PathLike) -> None:
    """Find what the readers of files would die of: of thousands of brackets in one another, or of columns, for hours.

    Raises:
        InputError: for such a file.
    """
    kind = Path(file).suffix
    if kind not in (".json", ".jsonl", ".csv", ".tsv") or not os.path.isfile(file):  # an address
        return
    with open(file, "rb") as opened:
        if kind in (".csv", ".tsv"):
            text = opened.readline(2**20), opened.readline(2**20)  # names, and the first row, which may have more
            if max(line.count(comma) for line in text for comma in (b",", b"\t")) > MOST_COLUMNS:
                raise InputError(f"The file {str(file)!r} has more than {MOST_COLUMNS} columns.")
            return
        depth = 0
        while block := opened.read(2**14):
            opening = block.count(b"[") + block.count(b"{")
            if depth + opening > DEEPEST:  # if none closes before, and all are outside of strings
                break
            depth += opening - block.count(b"]") - block.count(b"}")
        else:
            return
        opened.seek(0)
        depth = 0
        for token in re.finditer(rb'"(?:[^"\\]+|\\.)*+"|[\[{]|[\]}]', opened.read(), re.DOTALL):
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
            if depth > DEEPEST:
                raise InputError(f"In the file {str(file)!r}, brackets are nested more than {DEEPEST} deep.")


def read_coco(file: str) -> datasets.Dataset | None:
    """COCO's caption annotations, or Karpathy's `dataset_coco.json`: one row for each image, with all its captions.

    Karpathy's "restval" is trained on, as everybody does. `None` if the file is neither.
    """
    with open(file, encoding="utf-8") as opened:
        if not re.search(r'^\s*\{.*"(images|annotations)"\s*:\s*\[', opened.read(2**20), re.DOTALL):
            return None
        opened.seek(0)
        content = json.load(opened)
    images = content.get("images")
    if not isinstance(images, list):
        return None
    if "annotations" in content:
        captions = {image["id"]: [] for image in images}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        rows = {"image": [image["file_name"] for image in images], "image_id": list(captions)}
        return datasets.Dataset.from_dict({**rows, "caption": list(captions.values())})
    return datasets.Dataset.from_list(
        [
            {
                "image": os.path.join(image.get("filepath", ""), image["filename"]),
                "image_id": image.get("cocoid", image.get("imgid")),
                "caption": [sentence["raw"] for sentence in image["sentences"]],
                "split": "train" if image["split"] == "restval" else image["split"],
            }
            for image in images
        ]
    )


def why_not_loaded(name: str, files: list[str], error: Exception) -> str:
    """One sentence that says why, with the line of a JSON file that is to blame."""
    if isinstance(error, InputError):
        return str(error)
    reason = reason_of(error)
    if files:
        if files[0].endswith(("json", "jsonl")):
            reason = next(filter(None, map(broken_line, files)), reason)
        return f"The file {name!r} cannot be read: {reason.rstrip('.')}."
    kind = "folder" if os.path.exists(name) else "data set"
    return (
        f"The {kind} {name!r} cannot be loaded: {reason} Give a data set id of the Hub, a folder of images with a "
        "metadata.jsonl beside them, or a file of rows."
    )


def reason_of(error: Exception) -> str:
    """What the library, or the reader of files below it, says went wrong."""
    cause = error.__cause__ or error
    reason = " ".join((str(cause).splitlines() or [""])[0].split()).removeprefix("Error tokenizing data. C error: ")
    if isinstance(cause, StopIteration) or "corresponds to no data" in reason:
        return "it has no rows"
    return f"{reason} is missing" if isinstance(cause, KeyError) else reason


def broken_line(file: str) -> str | None:
    """Where a file of JSON, or of JSON lines, is none."""
    try:
        text = Path(file).read_text(encoding="utf-8")
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip().startswith("["):
                return f"line {error.lineno} is no JSON ({error.msg})"
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    json.loads(line or "0")
                except json.JSONDecodeError as error:
                    return f"line {number} of {os.path.basename(file)} is no JSON ({error.msg})"
    except (OSError, RecursionError, ValueError) as error:  # no text, or numbers of thousands of digits
        return str(error)
    return None
