"""From captioned rows to batches: which columns, which rows can be read, as which tensors."""

import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..common.errors import InputError
from .augmentation import Augmentation
from .features import SplitFeatures
from .images import open_cell
from .loading import with_nested
from .skipped_rows import SkippedRows


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
        augmentation: what training shows differently each time.
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
        augmentation: Augmentation | None = None,
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
        self.augmentation = augmentation or Augmentation()
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
            random = self.augmentation.random(int(self.epoch), index)
            try:
                return {**self._look(index, random), **self.augmentation.vary_text(self.captions[index], random)}
            except OSError as error:
                self.skipped.add(self.split, index, self._file(index), str(error))
        raise self._nothing_to_see()

    def _look(self, index: int, random: torch.Generator) -> dict:
        if self.features is None:
            return {"image": self.augmentation.vary_image(self._open(index), random)}
        views = self.features.views if self.augmentation.any_view else 1
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
