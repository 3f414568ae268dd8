"""Local folders of images: which of their files holds the captions, and which splits they have."""

import os
from pathlib import Path

import datasets

from ..common.errors import InputError, one_line
from ..common.logging import get_logger
from .caption_forms import VizWizRules
from .columns import Rows
from .folder_files import FolderFiles, ImageFinder
from .names import IMAGE_NAMES, find_name
from .row_files import TABLE_SUFFIXES, check_table, dataset_loading_error, read_files
from .sidecars import kind_of_text, rows_of_sidecars, texts_of_images
from .skipped_rows import SkippedRows
from .split_names import split_of_file, splits_of_files, splits_of_folders

logger = get_logger(__name__)

STREAM_SHARDS = 64  # so many readers share a stream without reading each other's rows


def read_folder(
    name: str, streaming: bool, skipped: SkippedRows, rules: VizWizRules | None = None
) -> dict[str, Rows] | None:
    """Read a folder of images. Names of image files never decide anything.

    The captions come from the first of these that exists:

    1. `metadata.jsonl` or `metadata.csv`, in the folder or in its subfolders;
    2. another file of captions: one with "caption" in its name, or else any table with a column of images;
    3. a text of the same name as each image: `dog.caption`, `dog.txt` or `dog.json`.

    A column of splits or the names of the files of captions give the splits. Otherwise folders such as `train` and
    `val2017` are splits, and each folder beside them is a split of its own name.

    Args:
        name: the folder.
        streaming: return streams.
        skipped: record of the images that a file of captions does not mention, and of texts without an image.
        rules: rules for the captions of VizWiz.

    Returns:
        The rows of each split, whose column `image` holds paths. `None` for a folder that `datasets` reads: one of
        parquet files, or with configurations in its README.md.

    Raises:
        InputError: if several files could hold the captions, or the file of captions cannot be read.
    """
    files = FolderFiles.of(name)
    if has_configurations(name):
        return None
    if not files.images:
        return rows_of_files(name, files, streaming, rules, skipped)
    for link in files.links:
        logger.warning("The folder %r of %r is a symbolic link, which is not read: give it as a data set.", link, name)
    parts = tables_of_captions(name, files, rules, skipped)
    of_files = splits_of_files(list(parts)) if len(parts) > 1 else {}
    if parts:
        record_unmentioned(files, parts, skipped)
        rows, source = datasets.concatenate_datasets(list(parts.values())), f"captions from {', '.join(parts)}"
    else:
        rows, source = rows_of_sidecars(name, files, skipped)
    logger.info("%r has %d images and %d rows with %s.", name, len(files.images), len(rows), one_line(source, 300))
    if of_files:
        labels = [of_files[file] for file, part in parts.items() for _ in range(len(part))]
    elif find_name(("split",), rows.column_names) is not None:
        labels = ["train"] * len(rows)  # `load_rows` splits them by the column
    else:
        labels = splits_of_folders(rows["image"])
    rows = with_whole_paths(rows, name, files)
    splits = {}
    for split in dict.fromkeys(labels):
        splits[split] = rows.select([number for number, label in enumerate(labels) if label == split])
    if streaming:
        return {split: part.to_iterable_dataset(min(STREAM_SHARDS, len(part))) for split, part in splits.items()}
    return splits


def rows_of_files(
    name: str, files: FolderFiles, streaming: bool, rules: VizWizRules | None, skipped: SkippedRows
) -> dict[str, Rows] | None:
    """Read a folder of tables or tars without images, or return `None` if it holds anything else.

    The split of a file is a word in its name, or its outermost folder. Without them, all files are "train". A parquet
    file with the name of a tar, as img2dataset writes it, only repeats the texts of the samples.
    """
    tables = [file for file in files.others if os.path.splitext(file)[1].lower() in (".csv", ".tsv", ".jsonl", ".tar")]
    tars = {os.path.splitext(file)[0] for file in tables if file.lower().endswith(".tar")}
    others = (os.path.splitext(file) for file in files.others)
    if not tables or any(suffix.lower() in (".parquet", ".arrow") and stem not in tars for stem, suffix in others):
        return None
    by_split: dict[str, list[str]] = {}
    for file, folder_split in zip(tables, splits_of_folders(tables), strict=True):
        by_split.setdefault(split_of_file(file) or folder_split, []).append(os.path.join(name, file))
    return {split: read_files(paths, streaming, rules, skipped)["train"] for split, paths in by_split.items()}


def with_whole_paths(rows: datasets.Dataset, name: str, files: FolderFiles) -> datasets.Dataset:
    """Return the rows with absolute paths of the images in the folder, so that rows are usable without its name.

    All other values stay as written: where they may lead is checked when they are opened.
    """
    root, images = os.path.abspath(name), set(files.images)
    paths = [os.path.join(root, path) if isinstance(path, str) and path in images else path for path in rows["image"]]
    others = rows.remove_columns("image")
    whole = datasets.Dataset.from_dict({"image": paths})
    return datasets.concatenate_datasets([whole, others], axis=1) if others.column_names else whole


def has_configurations(name: str) -> bool:
    """Return whether the README.md of a folder says how `datasets` should read it."""
    readme = Path(name) / "README.md"
    if not readme.is_file():
        return False
    text = readme.read_text(encoding="utf-8", errors="replace")
    return text.startswith("---") and "\nconfigs:" in text.split("\n---")[0]


# ----------------------------------------------------------------------------------------------------------------------
# Files of captions
# ----------------------------------------------------------------------------------------------------------------------


def tables_of_captions(
    name: str, files: FolderFiles, rules: VizWizRules | None, skipped: SkippedRows
) -> dict[str, datasets.Dataset]:
    """Read the files of captions of a folder, with the paths of their images relative to the folder.

    Raises:
        InputError: if files compete, or the only one cannot be read.
    """
    suffixes = {file: os.path.splitext(file)[1].lower() for file in files.others}
    beside = {suffixes[file] for texts in texts_of_images(files).values() for file in texts.values()}
    named_as_images = {stem_of(image) for image in files.images}
    tables = [
        file
        for file in files.others
        if suffixes[file] in TABLE_SUFFIXES and not (kind_of_text(file) and stem_of(file) in named_as_images)
    ]
    names = {file: os.path.basename(file).lower() for file in tables}
    metadata = [file for file in tables if os.path.splitext(names[file])[0] == "metadata"]
    captions = [file for file in tables if "caption" in names[file]]
    others = [file for file in tables if suffixes[file] not in beside]
    for group in (metadata, captions, others):  # the more explicit a name is, the earlier
        parts, errors = {}, []
        for file in group:
            try:
                part = read_file_of_captions(name, file, files, rules, skipped)
            except InputError as error:
                errors.append(error)
                continue
            if part is not None:
                parts[file] = part
            elif group is metadata:
                raise InputError(f"{os.path.join(name, file)[-200:]!r} has no column of images: add file_name.")
            elif group is captions:
                logger.warning("%r is left out, because it has no column of images: add file_name.", file)
        # A table of another purpose may be beside the captions, but without any captions it is the one to mend.
        if errors and (group is not others or not (parts or beside)):
            raise errors[0]
        for reason in errors:
            logger.info("Left out as a file of captions: %s", reason)
        if parts:
            check_competition(name, list(parts), files)
            return parts
    return {}


def stem_of(file: str) -> str:
    """Return the name of a file without folder and suffix."""
    return os.path.splitext(os.path.basename(file))[0]


def read_file_of_captions(
    name: str, file: str, files: FolderFiles, rules: VizWizRules | None, skipped: SkippedRows
) -> datasets.Dataset | None:
    """Read a file of captions, or return `None` for a table without a column of images.

    Raises:
        InputError: if it cannot be read.
    """
    path = os.path.join(name, file)
    try:
        check_table(path)
        rows = read_files([path], False, rules, skipped)["train"]
    except Exception as error:  # `datasets` raises a different class for each way of failing
        raise dataset_loading_error(path, [path], error) from error
    column = find_name(IMAGE_NAMES, rows.column_names)
    if column is None:
        return None
    finder, folder = ImageFinder(files.images), os.path.dirname(file)
    split = split_of_file(file)
    images = [finder.find(value, folder, split) for value in rows[column]]
    return rows.remove_columns(column).add_column("image", images)


def check_competition(name: str, tables: list[str], files: FolderFiles) -> None:
    """Check that each image can be in only one of several files of captions.

    Files of different splits do not compete, nor do files in different folders, unless one contains the other.

    Raises:
        InputError: if files compete.
    """
    folders = [os.path.dirname(table) for table in tables]
    nested = any(
        one == other or other.startswith(f"{one}/" if one else "")
        for number, one in enumerate(folders)
        for place, other in enumerate(folders)
        if number != place
    )
    if nested and not splits_of_files(tables):
        shown = one_line(", ".join(map(repr, tables)), 150)
        of_images = os.path.commonpath([os.path.dirname(os.path.join(name, image)) for image in files.images])
        raise InputError(
            f"Several files of {name[-90:]!r} hold captions, {shown}: choose one, such as --dataset_name "
            f"{os.path.join(name, tables[0])[-90:]} --image_folder {of_images[-90:]}."
        )


def record_unmentioned(files: FolderFiles, parts: dict[str, datasets.Dataset], skipped: SkippedRows) -> None:
    """Record the images that no file of captions mentions."""
    mentioned = {path for part in parts.values() for path in part["image"] if isinstance(path, str)}
    unmentioned = [image for image in files.images if image not in mentioned]
    for image in unmentioned:
        skipped.add("train", None, image, "No file of captions mentions this image.")
    if unmentioned:
        logger.info("%d images are left out, as no file of captions mentions them.", len(unmentioned))
