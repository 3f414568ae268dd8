"""From captioned rows to batches: which columns, which rows can be read, as which tensors."""

import io
import json
import math
import os
from pathlib import Path

import datasets
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ..processing_qformer import QFormerCaptionerProcessor, open_image
from . import InputError


class SkippedRows:
    """The rows that could not be used: split, row number, file and reason of each.

    They wait in memory until the run owns its output folder and says where to write them. Data-loading processes append
    to the same JSON-lines file, so a row may stand there twice; it counts once.
    """

    def __init__(self):
        self.path: Path | None = None
        self.waiting: list[dict] = []

    def add(self, split: str, row: int, file: str | None, reason: str) -> None:
        entry = {"split": split, "row": row, "file": file, "reason": reason}
        if self.path is None:
            self.waiting.append(entry)
            return
        with self.path.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def write_to(self, path: str | os.PathLike) -> None:
        """Write what there is, and from now on everything, to this file, behind what a killed run left there."""
        self.path = Path(path)
        for entry in self.waiting:
            self.add(**entry)
        self.waiting = []

    def __len__(self) -> int:
        entries = list(self.waiting)
        if self.path is not None and self.path.exists():
            entries += [json.loads(line) for line in self.path.read_text().splitlines()]
        return len({(entry["split"], entry["row"]) for entry in entries})


class CaptionDataset(Dataset):
    """Rows of `{"image": PIL image, "captions": [str, ...]}`; one that cannot be read is skipped and written down.

    A row without any caption is left out from the start. Whether an image can be read shows when it is opened: in
    training the next row takes its place, for evaluation [`~CaptionDataset.readable`] opens all of them first.

    Args:
        rows: the data set.
        split: its name in the record of skipped rows.
        image_column: holds images, or paths of images.
        caption_column: holds a caption, or a list of captions.
        skipped: the record.
        smallest_crop: for training: show random parts of the images, with at least this share of their area.
        captions_per_image: for training: draw so many of an image's captions each time; by default give all.
        flip: for training: mirror an image, left to right, with this probability.

    Raises:
        InputError: if a column is not there, or no row has a caption.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        split: str,
        image_column: str,
        caption_column: str,
        skipped: SkippedRows,
        smallest_crop: float | None = None,
        captions_per_image: int | None = None,
        flip: float = 0.0,
    ):
        for column in (image_column, caption_column):
            if column not in rows.column_names:
                there = ", ".join(map(repr, rows.column_names))
                raise InputError(
                    f"The data set has no column {column!r}; its columns are {there}. "
                    "Choose with --image_column and --caption_column."
                )
        self.split = split
        self.skipped = skipped
        self.smallest_crop = smallest_crop
        self.captions_per_image = captions_per_image
        self.flip = flip
        self.rows = rows
        # Undecoded: a damaged image must fail here, one by one, and not inside the library, batch by batch.
        self.images = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
        self.image_column = image_column
        self.captions = [captions_of(value) for value in rows[caption_column]]
        self.indices = [index for index, captions in enumerate(self.captions) if captions]
        for index in sorted(set(range(len(rows))) - set(self.indices)):
            skipped.add(split, index, self._file(index), "no caption")
        if not self.indices:
            raise InputError(f"No row of the {split} split has a caption in its column {caption_column!r}.")

    def _file(self, index: int) -> str | None:
        cell = self.images[index][self.image_column]
        return cell and cell["path"]

    def _open(self, index: int) -> Image.Image:
        return open_cell(self.images[index][self.image_column])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict:
        for step in range(len(self)):
            index = self.indices[(position + step) % len(self)]
            try:
                image = self._open(index)
                if self.smallest_crop is not None:
                    image = random_resized_crop(image, self.smallest_crop)
                if self.flip and torch.rand(()) < self.flip:
                    image = ImageOps.mirror(image)
                captions = self.captions[index]
                if self.captions_per_image is not None:
                    drawn = torch.randperm(len(captions))[: self.captions_per_image]
                    captions = [captions[each] for each in drawn]
                return {"image": image, "captions": captions}
            except OSError as error:
                self.skipped.add(self.split, index, self._file(index), str(error))
        raise self._nothing_to_see()

    def _nothing_to_see(self) -> InputError:
        return InputError(
            f"Not one image of the {self.split} split can be read, from {self._file(self.indices[0])!r} on: check the "
            f"files, or the column {self.image_column!r}."
        )

    def readable(self) -> "CaptionDataset":
        """Leave out, from the start, the rows whose image cannot be opened: an evaluation must know its rows."""
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

    def references(self) -> list[list[str]]:
        """The captions of each row, in order."""
        return [self.captions[index] for index in self.indices]

    def column(self, name: str) -> list:
        """Another column of the data set, of each row in order."""
        values = self.rows[name]
        return [values[index] for index in self.indices]


def open_cell(cell: dict | None) -> Image.Image:
    """Open an image as an undecoded column holds it: `{"bytes": ..., "path": ...}`, of which one is enough.

    Raises:
        OSError: if there is none or it cannot be read; the message names it where it has a name.
    """
    if cell is None:
        raise OSError("The row has no image.")
    if cell["bytes"] is None:
        return open_image(cell["path"])
    try:
        return open_image(Image.open(io.BytesIO(cell["bytes"])))
    except Exception as error:  # as many kinds as `open_image` knows
        name = os.path.basename(cell["path"] or "") or "without a name"
        raise OSError(f"The image {name!r} cannot be read, it may be damaged or no image at all ({error}).") from error


def random_resized_crop(image: Image.Image, smallest: float) -> Image.Image:
    """A random part of an image: `smallest` to all of its area, width to height 3:4 to 4:3 (Szegedy et al. 2014).

    Draws from torch's random numbers, which the Trainer keeps with its checkpoints. An image from which no such part
    can be cut stays whole.
    """
    width, height = image.size
    for _ in range(10):
        share, shape, x, y = torch.rand(4).tolist()
        area = width * height * (smallest + (1 - smallest) * share)
        ratio = math.exp((2 * shape - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = round(x * (width - w)), round(y * (height - h))
            return image.crop((left, top, left + w, top + h))
    return image


def captions_of(value: str | list | None) -> list[str]:
    """The captions in a cell, blank ones left out: a string, a list of strings, or of COCO-style `{"raw": string}`."""
    captions = [value] if isinstance(value, str) else value or []
    captions = [caption["raw"] if isinstance(caption, dict) else caption for caption in captions]
    return [caption.strip() for caption in captions if caption and caption.strip()]


class ShuffledImages(Dataset):
    """The same rows with each other's images: no row keeps its own. A captioner that looks must do worse here."""

    def __init__(self, dataset: CaptionDataset, seed: int = 0):
        self.dataset = dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.image_of = dict(zip(order, order[1:] + order[:1], strict=True))  # one big circle

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict:
        return {**self.dataset[position], "image": self.dataset[self.image_of[position]]["image"]}


class CaptionCollator:
    """Rows of a [`CaptionDataset`] to a batch of a [`QFormerCaptioner`].

    Returns `pixel_values` `[B, 3, H, W]`, `input_ids` and `attention_mask` `[B, P]` of the prompt, and `labels`
    `[B, K, T]`: all captions of each image, end-of-sequence included, padded with -100 (a row with fewer captions than
    the others has rows of nothing but -100).
    """

    def __init__(self, processor: QFormerCaptionerProcessor, max_caption_length: int | None = None):
        self.processor = processor
        self.max_caption_length = max_caption_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.processor(images=[row["image"] for row in rows])
        ids = [
            [self.processor.encode_caption(caption, max_length=self.max_caption_length) for caption in row["captions"]]
            for row in rows
        ]
        number = max(len(captions) for captions in ids)
        length = max(len(caption) for captions in ids for caption in captions)
        labels = torch.full((len(rows), number, length), -100)
        for b, captions in enumerate(ids):
            for k, caption in enumerate(captions):
                labels[b, k, : len(caption)] = torch.tensor(caption)
        return {**batch, "labels": labels}
