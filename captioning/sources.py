"""Where captioned rows come from: the Hub, a folder, files, or a brush."""

import functools
import glob
import json
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path

import datasets

from . import InputError
from .scenes import load_scenes

# What `datasets` reads a file with. In a CSV file nothing but text is meant: "NA" may be a caption.
READERS = {
    ".parquet": ("parquet", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".tar": ("webdataset", {}),
}
EVAL_SPLITS = ("validation", "val", "dev", "test")  # the first there is
MOST_COLUMNS, DEEPEST = 1000, 1000  # of a file of rows: columns, and brackets within brackets
PEEK = 10_000  # rows of a stream that are looked at where all of them would take too long
STREAMED_EVAL_SAMPLES = 500

Rows = datasets.Dataset | datasets.IterableDataset


def load_rows(
    name: str,
    config_name: str | None = None,
    split_column: str = "split",
    split: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> dict[str, Rows]:
    """Load a data set, by split.

    Args:
        name: a data set on the Hub; a local folder (images with a `metadata.jsonl` or `metadata.csv`, parquet, ...); a
            file of rows (`.parquet`, `.json`, `.jsonl`, `.csv`, `.tsv`), of webdataset samples (`.tar`), or of COCO's
            annotations; or several files, as in `shards/*.tar` or `train-{000..015}.tar`.
        config_name: which of a data set's configurations.
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        split: load (and download) this split alone.
        revision: which branch, tag or commit of a data set on the Hub.
        streaming: read rows when they are asked for, and keep none.

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.

    Example:

    ```python
    >>> rows = load_rows("shards/train-{000..015}.tar", streaming=True)  # doctest: +SKIP
    >>> row = next(iter(rows["train"]))  # doctest: +SKIP
    ```
    """
    files = find_files(name)
    try:
        for file in files or Path(name).rglob("*.json*"):
            check_text(file)
        if files:
            rows = read_files(files, streaming)
        else:
            place = os.path.abspath(name) if os.path.isdir(name) else name  # "." is no name to the library
            data_files = None
            if split is not None:  # or all splits would be downloaded
                data_files = datasets.load_dataset_builder(place, config_name, revision=revision).config.data_files
                data_files = {split: data_files[split]} if split in data_files else data_files
            rows = datasets.load_dataset(
                place, config_name, data_files=data_files, revision=revision, streaming=streaming
            )
        if streaming:
            next(iter(undecoded(next(iter(rows.values())))))  # what cannot be read should fail now
    except Exception as error:  # the library raises a different class for each way of not finding it
        raise InputError(why_not_loaded(name, files, error)) from error
    if len(rows) == 1 and split_column in columns_of(only := next(iter(rows.values()))):
        parts = split_by(only, split_column)
        rows = parts if split is None or split in parts else rows
    if split is not None and split not in rows:
        raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
    return {label: undecoded(part) if streaming else part for label, part in rows.items()}


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


def columns_of(rows: Rows) -> list[str]:
    """The names of the columns; of a stream that does not say, those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def with_nested(rows: datasets.Dataset, *columns: str) -> datasets.Dataset:
    """The rows, and those of the columns that lie inside others (`json.caption`) as columns of their own."""
    for column in columns:
        outer = column.split(".")[0]
        if column not in rows.column_names and outer in rows.column_names:
            nested = rows.select_columns(outer).flatten()
            if column in nested.column_names:
                rows = datasets.concatenate_datasets([rows, nested.select_columns(column)], axis=1)
    return rows


def split_by(rows: Rows, column: str) -> dict[str, Rows]:
    """The rows of each label in a column; of a stream, of each label in its first rows."""
    if isinstance(rows, datasets.Dataset):
        labels = rows[column]
        return {
            label: rows.select([i for i, own in enumerate(labels) if own == label]) for label in dict.fromkeys(labels)
        }
    rows = undecoded(rows)
    labels = dict.fromkeys(row[column] for row in rows.select_columns(column).take(PEEK))
    return {label: rows.filter(functools.partial(operator.eq, label), input_columns=column) for label in labels}


def undecoded(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """Images of a stream as bytes or paths: a damaged one must fail where it is opened, not inside the library."""
    return rows.decode(False) if rows.features else rows


def load_splits(
    name: str,
    config_name: str | None = None,
    train_split: str = "train",
    eval_split: str | None = None,
    split_column: str = "split",
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    streaming: bool = False,
    evaluate: bool = True,
) -> tuple[Rows, datasets.Dataset | None]:
    """Load the rows to train on and the rows to evaluate on.

    Args:
        name: as [`load_rows`] takes it, or "scenes" for pictures drawn on the spot.
        config_name: which of a data set's configurations.
        train_split, eval_split: names of splits. By default the evaluation split is the first there is of "validation",
            "val", "dev" and "test".
        split_column: where one split holds all rows and has a column of this name, the column tells the splits.
        max_train_samples, max_eval_samples: keep so many rows, the first ones (of scenes: draw so many).
        seed: of the scenes.
        revision: which branch, tag or commit of a data set on the Hub.
        streaming: give all rows to train on as a stream. Those to evaluate on are read into memory, 500 unless
            `max_eval_samples` says otherwise.
        evaluate: load rows to evaluate on, where there are any.

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.
    """
    if name == "scenes":
        rows = load_scenes(max_train_samples or 10_000, max_eval_samples or 200, seed=seed)
        return undecoded(rows["train"].to_iterable_dataset()) if streaming else rows["train"], rows["validation"]
    rows = load_rows(name, config_name, split_column, revision=revision, streaming=streaming)
    if eval_split is None:
        eval_split = next((split for split in EVAL_SPLITS if split in rows), None)
    for split in (train_split, eval_split if evaluate else None):
        if split is not None and split not in rows:
            raise InputError(f"The data set {name!r} has no split {split!r}; it has {', '.join(map(repr, rows))}.")
    train = rows[train_split] if streaming else first_rows(rows[train_split], max_train_samples)
    if not evaluate or eval_split is None:
        return train, None
    return train, held_out(rows[eval_split], f"The split {eval_split!r} of {name!r}", max_eval_samples)


def load_held_out(
    name: str,
    config_name: str | None = None,
    eval_split: str | None = None,
    split_column: str = "split",
    max_eval_samples: int | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> datasets.Dataset:
    """Load rows to evaluate on from a data set of their own; where it has one split only, that.

    Args are those of [`load_splits`].

    Raises:
        InputError: for a data set or split that is not there, or a file that cannot be read.
    """
    if name == "scenes":
        return load_scenes(1, max_eval_samples or 200)["validation"]
    rows = load_rows(name, config_name, split_column, revision=revision, streaming=streaming)
    split = eval_split or next((each for each in EVAL_SPLITS if each in rows), None)
    if eval_split is None and len(rows) == 1:
        (split,) = rows
    if split not in rows:
        raise InputError(
            f"The data set {name!r} has no split {split or 'validation'!r}; it has {', '.join(map(repr, rows))}. "
            "Choose with --eval_split."
        )
    return held_out(rows[split], f"The split {split!r} of {name!r}", max_eval_samples)


def held_out(rows: Rows, name: str, number: int | None) -> datasets.Dataset:
    """The first so many rows; those of a stream are read into memory."""
    if isinstance(rows, datasets.Dataset):
        return first_rows(rows, number)
    content = list(rows_of(rows.take(number or STREAMED_EVAL_SAMPLES), name))
    info = datasets.DatasetInfo(features=rows.features, builder_name=rows.info.builder_name)
    return datasets.Dataset.from_list(content, info=info)


def first_rows(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The first so many rows, or all."""
    return rows.select(range(min(number or len(rows), len(rows))))


def rows_of(rows: datasets.IterableDataset, name: str) -> Iterator[dict]:
    """The rows of a stream, all of them: `for row in rows` would share them out among data-loading processes.

    Raises:
        InputError: if a file cannot be read; the message begins with `name`.
    """
    try:
        for batch in rows.iter(batch_size=1):
            yield {column: values[0] for column, values in batch.items()}
    except Exception as error:  # each reader of files has errors of its own
        raise InputError(f"{name} cannot be read: {reason_of(error).rstrip('.')}.") from error


def folder_of_images(name: str, rows: Rows, image_folder: str | os.PathLike | None = None) -> Path | None:
    """The folder inside which the paths of an image column lie.

    Args:
        name, rows: a data set, and rows of it as they were loaded.
        image_folder: the folder, if it is another than that of the files.

    Returns:
        The folder, or `None` where `datasets` has found the images by itself (on the Hub, or among scenes).

    Raises:
        InputError: if the folder is not there.
    """
    if image_folder is not None:
        if not os.path.isdir(image_folder):
            raise InputError(f"There is no folder of images {str(image_folder)!r} (--image_folder).")
        return Path(image_folder)
    if name == "scenes":
        return None
    if os.path.isdir(name):
        return Path(name)
    if rows.info.builder_name == "imagefolder":
        return None
    files = [os.path.abspath(file) for file in find_files(name) if "://" not in file]
    return Path(os.path.commonpath([os.path.dirname(file) for file in files]) if files else ".")


def locate(path: str, folder: Path) -> Path:
    """The file that a path in a row means: one inside the folder of images, whoever wrote the row.

    Raises:
        OSError: for an address, or a path that leads out of the folder, be it through a symbolic link.
    """
    if "\0" in path or re.match(r"[a-z][a-z0-9+.-]*://|data:", path, re.IGNORECASE):
        raise OSError(f"{path[:200]!r} is no path, and images are read from files: download it first.")
    root = folder.resolve()
    try:
        found = (folder / path).resolve()
    except (ValueError, RuntimeError) as error:  # half a character; symbolic links that lead to each other
        raise OSError(f"{path[:200]!r} is no path ({error}).") from error
    inside = [root]
    if root.parent.name == "snapshots":  # in the Hub's cache files are links to blobs
        inside.append(root.parent.parent / "blobs")
    if not any(map(found.is_relative_to, inside)):
        raise OSError(
            f"{path[:200]!r} leads out of the folder of images {str(folder)!r}; --image_folder names another one."
        )
    return found
