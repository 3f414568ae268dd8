"""From captioned rows to batches: which columns, which rows can be read, as which tensors."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..processing_qformer import MAX_BYTES, QFormerCaptionerProcessor, open_image
from . import InputError
from .features import SplitFeatures
from .sources import locate, with_nested


class SkippedRows:
    """The rows that could not be used: split, row number, file and reason of each.

    They wait in memory until the run owns its output folder and says where to write them. Data-loading processes append
    to the same JSON-lines file, so a row may stand there more than once; it counts once. What a kill left of a line
    counts as not there.

    The rows of a stream have no numbers: `row` is null, and `place` is where the row came in the stream's own order.
    """

    def __init__(self):
        self.path: Path | None = None
        self.waiting: list[dict] = []
        self.known: set[str] = set()  # in this process

    def add(self, split: str, row: int | None, file: str | None, reason: str, place: int | None = None) -> None:
        entry = {"split": split, "row": row, "file": file, "reason": reason}
        if place is not None:
            entry["place"] = place
        if (line := json.dumps(entry)) in self.known:
            return
        self.known.add(line)
        if self.path is None:
            self.waiting.append(entry)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        with self.path.open("a") as lines:
            lines.write(line + "\n")

    def write_to(self, path: str | os.PathLike) -> None:
        """Write what there is, and from now on everything, to this file, behind what a killed run left there."""
        self.path = Path(path)
        if self.path.exists() and not self.path.read_bytes().endswith(b"\n"):
            self._write("")
        for entry in self.waiting:
            self._write(json.dumps(entry))
        self.waiting = []

    def __len__(self) -> int:
        lines = [json.dumps(entry) for entry in self.waiting]
        if self.path is not None and self.path.exists():
            lines += self.path.read_text(errors="replace").split("\n")
        rows = set()
        for line in lines:
            try:
                entry = json.loads(line)
                rows.add((entry["split"], entry["row"], entry.get("place")))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        return len(rows)


def check_crop(smallest_crop: float | None) -> None:
    """See that it is a share.

    Raises:
        InputError: if not.
    """
    if smallest_crop is not None and not 0 < smallest_crop <= 1:
        raise InputError(f"--smallest_crop is a share of an image's area, from 0 to 1, not {smallest_crop:g}.")


def check_flip(flip: float) -> None:
    """See that it is a probability.

    Raises:
        InputError: if not.
    """
    if not 0 <= flip <= 1:
        raise InputError(f"--flip is a probability, from 0 to 1, not {flip:g}.")


@dataclass
class Variations:
    """What training shows differently each time it comes to a row.

    All of it follows from the seed, the epoch and the row, and from nothing else: so it does not matter how many
    processes and workers load the data, nor where a killed run goes on.

    Args:
        smallest_crop: show random parts of the images, with at least this share of their area.
        flip: mirror an image, left to right, with this probability.
        captions_per_image: draw so many of an image's captions each time; by default give all.
        prompts: draw one of these.
        any_view: draw one of the views that precomputed features have; by default show the whole image.
        seed: of all that.
    """

    smallest_crop: float | None = None
    flip: float = 0.0
    captions_per_image: int | None = None
    prompts: Sequence[str] = ()
    any_view: bool = False
    seed: int = 0

    def random(self, epoch: int, row: int) -> torch.Generator:
        """The source of the random numbers of one row in one epoch."""
        # Of whole numbers `hash` is the same in every process, and the README's figures came from it.
        return torch.Generator().manual_seed(hash((self.seed, epoch, row)) % 2**63)

    def vary_image(self, image: Image.Image, random: torch.Generator) -> Image.Image:
        """A crop of an image, perhaps mirrored."""
        if self.smallest_crop is not None:
            image = random_resized_crop(image, self.smallest_crop, random)
        if self.flip and torch.rand((), generator=random) < self.flip:
            image = ImageOps.mirror(image)
        return image

    def vary_text(self, captions: list[str], random: torch.Generator) -> dict:
        """Some of the captions, and a prompt where there are any."""
        if self.captions_per_image is not None:
            drawn = torch.randperm(len(captions), generator=random)[: self.captions_per_image]
            captions = [captions[each] for each in drawn]
        if not self.prompts:
            return {"captions": captions}
        return {
            "captions": captions,
            "prompt": self.prompts[int(torch.randint(len(self.prompts), (), generator=random))],
        }


class CaptionDataset(Dataset):
    """Rows of `{"image": PIL image, "captions": [str, ...]}`; one that cannot be read is skipped and written down.

    With `features`, `"image_embeds"` in place of an image says which row and view of which features: a batch of them is
    read at once. With prompts to draw from, each row has a `"prompt"`, too.

    A row without any caption is left out from the start. Whether an image can be read shows when it is opened: in
    training the next row takes its place, for evaluation [`~CaptionDataset.readable`] opens all of them first.

    Args:
        rows: the data set.
        split: its name in the record of skipped rows.
        image_column: holds images, or paths of images.
        caption_column: holds a caption, or a list of captions.
        skipped: the record.
        variations: what training shows differently each time.
        features: of the same rows, to be read instead of the images.
        image_id_column: rows with the same value in it are captions of one image, and become one row.
        image_folder: paths of images must lie inside this folder; by default they may lie anywhere.
        option_prefix: what the options that choose its columns begin with, in messages ("eval_").

    Raises:
        InputError: if a column is not there, no row has a caption, or there are features of other rows.

    Example:

    ```python
    >>> rows = {"image": [Image.new("RGB", (8, 8), "red")] * 2, "text": [["a red square", "all red"], []]}
    >>> dataset = CaptionDataset(datasets.Dataset.from_dict(rows), "train", "image", "text", SkippedRows())
    >>> len(dataset), dataset[0]["captions"], dataset.skipped.waiting[0]["reason"]
    (1, ['a red square', 'all red'], 'no caption')
    ```
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        split: str,
        image_column: str,
        caption_column: str,
        skipped: SkippedRows,
        variations: Variations | None = None,
        features: SplitFeatures | None = None,
        image_id_column: str | None = None,
        image_folder: Path | None = None,
        option_prefix: str = "",
    ):
        rows = with_nested(rows, image_column, caption_column)
        for option, column in (
            (f"{option_prefix}image_column", image_column if features is None else None),
            (f"{option_prefix}caption_column", caption_column),
            ("image_id_column", image_id_column),
        ):
            if column is not None and column not in rows.column_names:
                raise no_such_column(option, column, rows.column_names)
        self.split = split
        self.skipped = skipped
        self.variations = variations or Variations()
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # so that data-loading processes see it move on
        self.rows = rows
        self.features = features
        self.images = None
        if image_column in rows.column_names:
            # Undecoded: a damaged image must fail here, one by one, and not inside the library, batch by batch.
            try:
                self.images = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
            except (TypeError, ValueError, pa.ArrowException) as error:
                kind = rows.features[image_column]
                raise InputError(
                    f"The column {image_column!r} holds {kind}, and no images or paths: choose with "
                    f"--{option_prefix}image_column."
                ) from error
        self.image_column = image_column
        self.image_folder = image_folder
        self.captions = [captions_of(value) for value in rows[caption_column]]
        others = set()
        if image_id_column is not None:
            others = self._gather_captions(self._image_ids(image_id_column))
        self.indices = [index for index, captions in enumerate(self.captions) if captions]
        for index in sorted(set(range(len(rows))) - set(self.indices) - others):
            skipped.add(split, index, self._file(index), "no caption")
        if not self.indices:
            raise InputError(f"No row of the {split} split has a caption in its column {caption_column!r}.")
        if features is not None:
            self._leave_out_rows_without_features()

    def _image_ids(self, column: str) -> list:
        """Of each row. An image is its own: told by its path, or where it has none by what is in it."""
        if not isinstance(self.rows.features[column], datasets.Image):
            return self.rows[column]
        cells = self.rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        return [cell and (cell["path"], hash(cell["bytes"])) for cell in cells[column]]

    def _gather_captions(self, image_ids: list) -> set[int]:
        """Give all captions of an image to its first row; returns the other rows."""
        first_row = {}
        others = set()
        for index, image_id in enumerate(image_ids):
            if image_id is None or image_id == "":  # nobody knows whose it is
                continue
            first = first_row.setdefault(image_id, index)
            if first != index:
                self.captions[first] += self.captions[index]
                self.captions[index] = []
                others.add(index)
        return others

    def _leave_out_rows_without_features(self) -> None:
        if len(self.features) < len(self.rows):
            raise InputError(
                f"The {self.split} split has {len(self.rows)} rows, but there are features of {len(self.features)} "
                "only: precompute them again."
            )
        if self.images is not None:
            self.features.check_rows(self.images, self.image_column)
        for index in self.indices:
            if not self.features.present[index]:
                self.skipped.add(self.split, index, self._file(index), "no features: its image could not be read")
        self.indices = [index for index in self.indices if self.features.present[index]]
        if not self.indices:
            raise InputError(f"Not one row of the {self.split} split has features.")

    def _file(self, index: int) -> str | None:
        cell = self.images and self.images[index][self.image_column]
        return cell and cell["path"]

    def _open(self, index: int) -> Image.Image:
        return open_cell(self.images[index][self.image_column], self.image_folder)

    def set_epoch(self, epoch: int) -> None:
        """Vary the rows as epoch `epoch` does."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict:
        if position >= len(self):
            raise IndexError(f"The {self.split} split has {len(self)} rows with a caption, and none at {position}.")
        for step in range(len(self)):
            index = self.indices[(position + step) % len(self)]
            random = self.variations.random(int(self.epoch), index)
            try:
                return {**self._look(index, random), **self.variations.vary_text(self.captions[index], random)}
            except OSError as error:
                self.skipped.add(self.split, index, self._file(index), str(error))
        raise self._nothing_to_see()

    def _look(self, index: int, random: torch.Generator) -> dict:
        if self.features is None:
            return {"image": self.variations.vary_image(self._open(index), random)}
        views = self.features.views if self.variations.any_view else 1
        view = int(torch.randint(views, (), generator=random)) if views > 1 else 0
        return {"image_embeds": (self.features, index, view)}

    def _nothing_to_see(self) -> InputError:
        return InputError(
            f"Not one image of the {self.split} split can be read, from {self._file(self.indices[0])!r} on: check the "
            f"files, or the column {self.image_column!r}."
        )

    def readable(self) -> "CaptionDataset":
        """Leave out, from the start, the rows whose image cannot be opened: an evaluation must know its rows."""
        if self.features is not None:
            return self
        kept = []
        for index in self.indices:
            try:
                self._open(index)
                kept.append(index)
            except OSError as error:
                self.skipped.add(self.split, index, self._file(index), str(error))
        if not kept:
            raise self._nothing_to_see()
        self.indices = kept
        return self

    def picture(self, position: int) -> Image.Image:
        """The image of a row for people to look at; a grey one where only its features are there."""
        try:
            if self.images is not None:
                return self._open(self.indices[position])
        except OSError:  # it was there when its features were computed
            pass
        return Image.new("RGB", (64, 64), "lightgray")

    def references(self) -> list[list[str]]:
        """The captions of each row, in order."""
        return [self.captions[index] for index in self.indices]

    def column(self, name: str) -> list:
        """Another column of the data set, of each row in order."""
        values = self.rows[name]
        return [values[index] for index in self.indices]


def no_such_column(option: str, column: str, there: Sequence[str]) -> InputError:
    """An error that names the columns there are."""
    there = ", ".join(map(repr, there))
    return InputError(f"The data set has no column {column!r}; its columns are {there}. Choose with --{option}.")


def open_cell(cell: dict | None, folder: Path | None = None) -> Image.Image:
    """Open an image as an undecoded column holds it: `{"bytes": ..., "path": ...}`, of which one is enough.

    Args:
        cell: the image.
        folder: its path must lie inside this folder; by default it may lie anywhere.

    Raises:
        OSError: if there is none or it cannot be read; the message names it where it has a name.
    """
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise OSError("The row has no image.")
    content, path = cell["bytes"], cell["path"]
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):  # of a stream without a type
        raise OSError("The row has no image, but something else.")
    if content is not None:
        return open_image(content, os.path.basename(path or ""))
    inner, _, archive = path.partition("::")
    if path.startswith("zip://") and archive and "::" not in archive:  # a stream of images in an archive
        path = f"{inner}::{archive if folder is None else locate(archive, folder)}"
    elif folder is not None or not path.startswith("hf://"):
        return open_image(Path(path) if folder is None else locate(path, folder))  # a path, and never an address
    try:
        with fsspec.open(path) as file:
            content = file.read(MAX_BYTES)
    except Exception as error:  # each kind of archive has errors of its own
        raise OSError(f"The image {path[:200]!r} cannot be read ({error}).") from error
    return open_image(content, os.path.basename(path.partition("::")[0]))


def random_resized_crop(image: Image.Image, smallest: float, random: torch.Generator) -> Image.Image:
    """A random part of an image: `smallest` to all of its area, width to height 3:4 to 4:3 (Szegedy et al. 2014).

    An image from which no such part can be cut stays whole.
    """
    width, height = image.size
    for _ in range(10):
        share, shape, x, y = torch.rand(4, generator=random).tolist()
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = round(x * (width - w)), round(y * (height - h))
            return image.crop((left, top, left + w, top + h))
    return image


CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tabs and ends of lines
MAX_CHARACTERS = 10_000


def captions_of(value: str | list | None) -> list[str]:
    """The captions in a cell, blank ones left out: a string, a list of strings, or of COCO-style `{"raw": string}`.

    COCO itself says "caption" for "raw". Numbers are text that a reader of files took for numbers. What else there is
    is no caption. Control characters become spaces, and longer texts are cut to 10,000 characters.
    """
    captions = value if isinstance(value, list) else [value]
    captions = [
        caption.get("raw", caption.get("caption")) if isinstance(caption, dict) else caption for caption in captions
    ]
    texts = [
        str(caption)[:MAX_CHARACTERS]
        for caption in captions
        if isinstance(caption, str | int | float)
        and not isinstance(caption, bool)  # which Python takes for a number
        and caption == caption  # and not NaN, which stands for nothing
    ]
    return [text for text in (CONTROL.sub(" ", text).strip() for text in texts) if text]


class ShuffledImages(Dataset):
    """The same rows with each other's images: no row of several keeps its own. A captioner that looks must do worse.

    Example:

    ```python
    >>> ShuffledImages(dataset)[0]  # doctest: +SKIP
    {'image': <PIL.Image.Image ...>, 'captions': ['a red circle above a blue star']}
    ```
    """

    def __init__(self, dataset: CaptionDataset, seed: int = 0):
        self.dataset = dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.image_of = dict(zip(order, order[1:] + order[:1], strict=True))  # one big circle

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict:
        own = self.dataset.captions[self.dataset.indices[position]]
        return {**self.dataset[self.image_of[position]], "captions": own}


class CaptionCollator:
    """Rows of a [`CaptionDataset`] to a batch of a [`QFormerCaptioner`].

    Returns `pixel_values` `[B, 3, H, W]` or `image_embeds` `[B, N, Dv]`, `input_ids` and `attention_mask` `[B, P]` of
    the prompt, and `labels` `[B, K, T]`: all captions of each image, end-of-sequence included, padded with -100 (a row
    with fewer captions than the others has rows of nothing but -100).

    Args:
        processor: the captioner's.
        max_caption_length: cut longer captions to so many tokens.

    Example:

    ```python
    >>> collate = CaptionCollator(model.processor)  # doctest: +SKIP
    >>> loss = model(**collate([dataset[0], dataset[1]])).loss  # doctest: +SKIP
    ```
    """

    def __init__(self, processor: QFormerCaptionerProcessor, max_caption_length: int | None = None):
        self.processor = processor
        self.max_caption_length = max_caption_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [row.get("prompt") or self.processor.prompt for row in rows]
        if "image" in rows[0]:
            batch = self.processor(images=[row["image"] for row in rows], text=prompts)
        else:
            batch = self.processor(text=prompts)
            features, indices, views = zip(*(row["image_embeds"] for row in rows), strict=True)
            batch["image_embeds"] = features[0].read(indices, views)  # one copy, from file to batch
        ids = [
            [self.processor.encode_caption(caption, prompt, self.max_caption_length) for caption in row["captions"]]
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        number = max(len(captions) for captions in ids)
        length = max(len(caption) for captions in ids for caption in captions)
        labels = torch.full((len(rows), number, length), -100)
        for b, captions in enumerate(ids):
            for k, caption in enumerate(captions):
                labels[b, k, : len(caption)] = torch.tensor(caption)
        return {**batch, "labels": labels}
