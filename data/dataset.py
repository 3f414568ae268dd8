"""Data set of images with captions, read row by row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..common.errors import InputError, one_line
from .augmentation import Augmentation, RowText
from .captions import captions_of, describe, why_no_caption
from .columns import Rows, column_names, image_column_of, missing_column, with_nested_columns
from .features import FeatureRef, SplitFeatures
from .image_paths import ImageFolder
from .images import ImageCell, file_of_image, open_cell, undecoded_images
from .names import CAPTION_NAMES, find_name
from .skip_limit import SkipLimit, sample_of, try_images
from .skipped_rows import SkippedRows


class CaptionRow(RowText, total=False):
    """Row to train or evaluate on: its text, and an `image` (upright RGB) or precomputed `image_embeds`."""

    image: Image.Image
    image_embeds: FeatureRef


@dataclass(frozen=True)
class CaptionSource:
    """Rows of a split, with the names of the columns of images and captions.

    Args:
        name: name of the split, for messages and for the record of skipped rows.
        rows: the rows. The images of a stream must be undecoded, as [`load_rows`] returns them.
        image_column: column of images, or of paths of images.
        caption_column: column of captions: a string or a list in each row. It may be nested (`json.caption`).
        image_id_column: column that identifies images. Rows with the same value are merged into one row that has all
            their captions. Streams ignore it.
        image_folder: where paths of images start, and where they may lead. By default any path is allowed.
        option_prefix: prefix of the command-line options that choose the columns ("eval_"), for error messages.
    """

    name: str
    rows: Rows
    image_column: str = "image"
    caption_column: str = "caption"
    image_id_column: str | None = None
    image_folder: ImageFolder | None = None
    option_prefix: str = ""

    def with_existing_columns(self) -> "CaptionSource":
        """Return the source with the columns that the rows have.

        Where the column "image" or "caption" is missing, the only column with the same meaning takes its place, such as
        "file_name" or "text".
        """
        existing = column_names(self.rows)
        return replace(
            self,
            image_column=image_column_of(self.rows, self.image_column),
            caption_column=find_name(CAPTION_NAMES, existing, self.caption_column) or self.caption_column,
        )


class CaptionDataset(Dataset[CaptionRow]):
    """Map-style data set of images with captions.

    Rows without a caption are left out. An unreadable image is discovered only when it is opened. Both kinds of rows
    are recorded in `skipped`.

    **`dataset[i]` returns the next readable row if the image of row `i` cannot be read**, so that batches stay full.
    For evaluation, call [`~CaptionDataset.drop_unreadable`] first, so that each index is its own row.

    Args:
        source: the rows and their columns.
        skipped: record of the rows that cannot be used.
        augmentation: random changes to the rows. By default rows are not changed.
        features: precomputed features of the same rows, to use instead of the images.

    Raises:
        InputError: if a column does not exist, no row has a caption, or the features belong to other rows.

    Example:

    ```python
    >>> images, captions = [Image.new("RGB", (8, 8), "red")] * 2, [["a red square", "all red"], []]
    >>> rows = datasets.Dataset.from_dict({"image": images, "caption": captions})
    >>> dataset = CaptionDataset(CaptionSource("train", rows), SkippedRows())
    >>> len(dataset), dataset[0]["captions"], dataset.skipped.pending[0]["reason"]
    (1, ['a red square', 'all red'], 'no caption')
    ```
    """

    def __init__(
        self,
        source: CaptionSource,
        skipped: SkippedRows,
        augmentation: Augmentation | None = None,
        features: SplitFeatures | None = None,
    ):
        self.source = source = source.with_existing_columns()
        self.split = source.name
        self.rows: datasets.Dataset = with_nested_columns(source.rows, source.image_column, source.caption_column)
        self._check_columns(needs_images=features is None)
        self.skipped = skipped
        self.augmentation = augmentation or Augmentation()
        self.features = features
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # shared with the workers of a data loader
        self.images = None
        if source.image_column in self.rows.column_names:
            self.images = undecoded_images(
                self.rows, source.image_column, option=f"--{source.option_prefix}image_column"
            )
        cells = self.rows[source.caption_column]
        self.captions = [captions_of(value) for value in cells]
        merged = self._merge_rows_of_an_image()
        self.indices = [index for index, captions in enumerate(self.captions) if captions]
        for index in sorted(set(range(len(self.rows))) - set(self.indices) - merged):
            self._skip(index, why_no_caption(cells[index]))
        if not self.indices:
            raise no_caption(self.split, source, cells, self.rows.column_names)
        if features is not None:
            self._check_features(features)
            self._drop_rows_without_features(features)

    def _check_columns(self, needs_images: bool) -> None:
        prefix = self.source.option_prefix
        columns = {
            f"{prefix}image_column": self.source.image_column if needs_images else None,
            f"{prefix}caption_column": self.source.caption_column,
            "image_id_column": self.source.image_id_column,
        }
        for option, column in columns.items():
            if column is not None and column not in self.rows.column_names:
                raise missing_column(column, self.rows.column_names, option)

    def _merge_rows_of_an_image(self) -> set[int]:
        """Give all captions of an image to the first of its rows, and return the other rows."""
        if self.source.image_id_column is None:
            return set()
        first_rows: dict[Any, int] = {}
        merged = set()
        for index, image_id in enumerate(self._image_ids(self.source.image_id_column)):
            if image_id is None or image_id == "":  # the id is unknown, so the row is not merged
                continue
            first = first_rows.setdefault(image_id, index)
            if first != index:
                self.captions[first] += self.captions[index]
                self.captions[index] = []
                merged.add(index)
        return merged

    def _image_ids(self, column: str) -> list:
        """Return the id of each row. An image is identified by its path and its bytes."""
        if not isinstance(self.rows.features[column], datasets.Image):
            return self.rows[column]
        cells = self.rows.select_columns(column).cast_column(column, datasets.Image(decode=False))
        return [cell and (cell["path"], hash(cell["bytes"])) for cell in cells[column]]

    def _check_features(self, features: SplitFeatures) -> None:
        if len(features) < len(self.rows):
            raise InputError(
                f"The {self.split} split has {len(self.rows)} rows, but features exist for only {len(features)} of "
                "them: precompute them again."
            )
        if self.images is not None:
            features.check_rows(self.images, self.source.image_column)

    def _drop_rows_without_features(self, features: SplitFeatures) -> None:
        for index in self.indices:
            if not features.present[index]:
                self._skip(index, "no features: its image could not be read")
        self.indices = [index for index in self.indices if features.present[index]]
        if not self.indices:
            raise InputError(f"No row of the {self.split} split has features.")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> CaptionRow:
        if position >= len(self):
            raise IndexError(f"The {self.split} split has {len(self)} rows with a caption, not {position + 1}.")
        error = OSError()
        for index in self._indices_from(position):
            try:
                return self._read(index)
            except OSError as read_error:
                error = read_error
                self._skip(index, str(error))
        raise self._no_readable_image(error)

    def _indices_from(self, position: int) -> Iterator[int]:
        """Yield the row at a position, and then its substitutes: all rows after it, then all rows before it."""
        for step in range(len(self)):
            yield self.indices[(position + step) % len(self)]

    def _read(self, index: int) -> CaptionRow:
        generator = self.augmentation.generator(int(self.epoch), index)
        if self.features is not None:
            view = self.augmentation.draw_view(self.features.views, generator)
            text = self.augmentation.draw_text(self.captions[index], generator)
            return {"image_embeds": FeatureRef(self.features, index, view), **text}
        image = self.augmentation.augment_image(self._open_image(index), generator)
        return {"image": image, **self.augmentation.draw_text(self.captions[index], generator)}

    def _cell(self, index: int) -> ImageCell | None:
        return None if self.images is None else self.images[index][self.source.image_column]

    def _open_image(self, index: int) -> Image.Image:
        return open_cell(self._cell(index), self.source.image_folder)

    def _skip(self, index: int, reason: str) -> None:
        self.skipped.add(self.split, index, file_of_image(self._cell(index)), reason)

    def _no_readable_image(self, error: OSError) -> InputError:
        return InputError(
            f"No image of the {self.split[:100]} split can be read: {one_line(error, 330)} Check the files, or the "
            f"column {self.source.image_column[:50]!r}."
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the augmentation."""
        self.epoch.fill_(epoch)

    def check_images(self, limit: SkipLimit) -> None:
        """Open the images of all rows, or of a sample of many rows. With precomputed features nothing is opened.

        Raises:
            InputError: if the images of too many rows cannot be read.
        """
        if self.features is None:
            sample = sample_of(self.indices)
            limit.check(self.split, len(self), len(sample), list(self._unreadable(sample).values()))

    def drop_unreadable(self, limit: SkipLimit | None = None) -> "CaptionDataset":
        """Open all images once, drop the rows whose image cannot be read, and return this data set.

        Args:
            limit: largest number of rows that may be dropped.

        Raises:
            InputError: if no image can be read, or the images of too many rows cannot be read.
        """
        if self.features is not None:
            return self
        num_rows, errors = len(self), self._unreadable(self.indices)
        if limit is not None:
            limit.check(self.split, num_rows, num_rows, list(errors.values()))
        self.indices = [index for index in self.indices if index not in errors]
        if not self.indices:
            raise self._no_readable_image(next(iter(errors.values())))
        return self

    def _unreadable(self, indices: Sequence[int]) -> dict[int, OSError]:
        """Return the errors of the rows whose image cannot be read, and record these rows."""
        errors = {index: error for index, error in try_images(indices, self._open_image) if error is not None}
        for index, error in errors.items():
            self._skip(index, str(error))
        return errors

    def image_to_show(self, position: int) -> Image.Image:
        """Return the image of a row for display, or a grey image if only its features exist."""
        if self.images is not None:
            try:
                return self._open_image(self.indices[position])
            except OSError:  # the file was deleted after its features were computed
                pass
        return Image.new("RGB", (64, 64), "lightgray")

    def references(self) -> list[list[str]]:
        """Return the captions of each row."""
        return [self.captions[index] for index in self.indices]

    def column(self, name: str) -> list:
        """Return the values of another column of the data set, one for each row."""
        values = self.rows[name]
        return [values[index] for index in self.indices]


def no_caption(split: str, source: CaptionSource, cells: Sequence[Any], existing: Sequence[str]) -> InputError:
    """Return the error for a column without captions, with what it holds instead.

    Args:
        split: name of the split.
        source: the source of the rows.
        cells: the values of the caption column.
        existing: names of the columns.
    """
    held = next(filter(lambda held: held != "nothing", map(describe, cells)), "nothing")
    return InputError(
        f"No row of the {split} split has a caption in its column {source.caption_column!r}, which holds {held}; the "
        f"columns are {one_line(', '.join(map(repr, existing)), 200)}. Choose another with "
        f"--{source.option_prefix}caption_column."
    )


class ShuffledImages(Dataset[CaptionRow]):
    """Data set whose images are permuted among the rows, so that each row has the image of another row.

    If the captioner uses the image, its loss is higher on these rows.

    Args:
        dataset: the data set.
        seed: random seed of the permutation.

    Example:

    ```python
    >>> ShuffledImages(dataset)[0]  # doctest: +SKIP
    {'image': <PIL.Image.Image ...>, 'captions': ['a red circle above a blue star']}
    ```
    """

    def __init__(self, dataset: CaptionDataset, seed: int = 0):
        self.dataset = dataset
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        self.image_of = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all rows

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> CaptionRow:
        captions = self.dataset.captions[self.dataset.indices[position]]
        return {**self.dataset[self.image_of[position]], "captions": captions}
