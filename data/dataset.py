"""Data set of images with captions, read row by row."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..common.errors import InputError, one_line
from .augmentation import Augmentation, RowText
from .captions import describe
from .columns import Rows, column_names, image_column_of, missing_column, with_nested_columns
from .features import FeatureRef, SplitFeatures
from .image_paths import ImageFolder
from .images import (
    Cell,
    Picture,
    file_of_image,
    frames_of,
    id_of_image,
    middle_frame,
    open_cell,
    undecoded_images,
)
from .names import CAPTION_NAMES, find_name
from .skip_limit import SkipLimit, sample_of, try_images
from .skipped_rows import SkippedRows
from .texts import caption_columns, rows_of_texts


class CaptionRow(RowText, total=False):
    """Row to train or evaluate on: its text, and an `image` (upright RGB) or precomputed `image_embeds`.

    The image of a video is the list of its frames. `columns` are the other columns that were asked for.
    """

    image: Picture
    image_embeds: FeatureRef
    columns: dict[str, Any]


@dataclass(frozen=True)
class CaptionSource:
    """Rows of a split, with the names of the columns of images and captions.

    Args:
        name: name of the split, for messages and for the record of skipped rows.
        rows: the rows. The images of a stream must be undecoded, as [`load_rows`] returns them.
        image_column: column of images, or of paths of images.
        caption_column: column of captions: a string, a list or a conversation in each row. It may be nested
            (`json.caption`). Several columns have commas between them; all their captions are used.
        image_id_column: column that identifies images. Rows with the same value are merged into one row that has all
            their captions. Streams ignore it.
        image_folder: where paths of images start, and where they may lead. By default any path is allowed.
        option_prefix: prefix of the command-line options that choose the columns ("eval_"), for error messages.
        prompt_column: column of prompts. A row with an empty cell has the prompt of the captioner.
        num_frames: largest number of frames to read of a video. With 1, rows of several images are refused.
    """

    name: str
    rows: Rows
    image_column: str = "image"
    caption_column: str = "caption"
    image_id_column: str | None = None
    image_folder: ImageFolder | None = None
    option_prefix: str = ""
    prompt_column: str | None = None
    num_frames: int = 1

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

    A row is an image with captions that continue one prompt. A conversation gives a row for each round. Rows without a
    caption are left out. An unreadable image is discovered only when it is opened. Both kinds of rows
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
        self.rows: datasets.Dataset = with_nested_columns(source.rows, source.image_column)
        self._check_columns(needs_images=features is None)
        self.skipped = skipped
        self.augmentation = augmentation or Augmentation()
        self.features = features
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # shared with the workers of a data loader
        self.other_columns: datasets.Dataset | None = None
        self.images = None
        if source.image_column in self.rows.column_names:
            # Rows that were stored without images may have another kind of column under this name.
            is_optional = features is not None and not features.have_keys
            with contextlib.suppress(InputError) if is_optional else contextlib.nullcontext():
                self.images = undecoded_images(
                    self.rows, source.image_column, option=f"--{source.option_prefix}image_column"
                )
        self.row_of: list[int] = []  # of each text
        self.prompts: list[str] = []
        self.captions: list[list[str]] = []
        reasons: dict[int, str] = {}
        columns = source.caption_column, source.prompt_column, source.option_prefix
        for index, (row, text) in enumerate(rows_of_texts(self.rows, *columns)):
            self.row_of.append(row)
            self.prompts.append(text.prompt)
            self.captions.append(text.captions)
            if not text.captions:
                reasons[index] = text.reason
        merged = self._merge_rows_of_an_image()
        self.indices = [index for index, captions in enumerate(self.captions) if captions]
        for index in sorted(reasons.keys() - merged):
            self._skip(index, reasons[index])
        if not self.indices:
            raise no_caption(source)
        if features is not None:
            self._check_features(features)
            self._drop_rows_without_features(features)

    def _check_columns(self, needs_images: bool) -> None:
        prefix = self.source.option_prefix
        columns = {
            f"{prefix}image_column": self.source.image_column if needs_images else None,
            "image_id_column": self.source.image_id_column,
        }
        for option, column in columns.items():
            if column is not None and column not in self.rows.column_names:
                raise missing_column(column, self.rows.column_names, option)

    def _merge_rows_of_an_image(self) -> set[int]:
        """Give all captions of an image with one prompt to the first of its rows, and return the other rows."""
        if self.source.image_id_column is None:
            return set()
        first_rows: dict[Any, int] = {}
        merged = set()
        image_ids = self._image_ids(self.source.image_id_column)
        for index, (row, prompt) in enumerate(zip(self.row_of, self.prompts, strict=True)):
            if image_ids[row] is None or image_ids[row] == "":  # the id is unknown, so the row is not merged
                continue
            first = first_rows.setdefault((image_ids[row], prompt), index)
            if first != index:
                self.captions[first] += self.captions[index]
                self.captions[index] = []
                merged.add(index)
        return merged

    def _image_ids(self, column: str) -> list:
        """Return the id of each row. An image is identified by its path and its bytes, and a video by its frames."""
        feature = self.rows.features[column]
        if not isinstance(feature, datasets.Image | datasets.List | datasets.LargeList):
            return self.rows[column]
        cells = undecoded_images(self.rows, column, "--image_id_column")[column]
        return [None if cell in (None, []) else tuple(map(id_of_image, frames_of(cell))) for cell in cells]

    def _check_features(self, features: SplitFeatures) -> None:
        features.check_length(self.split, len(self.rows))
        if self.images is not None:
            features.check_rows(self.images, self.source.image_column)

    def _drop_rows_without_features(self, features: SplitFeatures) -> None:
        for index in self.indices:
            if not features.present[self.row_of[index]]:
                self._skip(index, f"no features: {features.reasons[index]}")
        self.indices = [index for index in self.indices if features.present[self.row_of[index]]]
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
            return {"image_embeds": FeatureRef(self.features, self.row_of[index], view), **self._text(index, generator)}
        image = self.augmentation.augment(self._open_image(index), generator)
        return {"image": image, **self._text(index, generator)}

    def _text(self, index: int, generator: torch.Generator) -> CaptionRow:
        text = self.augmentation.draw_text(self.captions[index], generator, self.prompts[index])
        if self.other_columns is None:
            return {**text}
        return {**text, "columns": self.other_columns[self.row_of[index]]}

    def _cell(self, index: int) -> Cell:
        return None if self.images is None else self.images[self.row_of[index]][self.source.image_column]

    def _open_image(self, index: int) -> Picture:
        return open_cell(self._cell(index), self.source.image_folder, self.source.num_frames)

    def _skip(self, index: int, reason: str) -> None:
        self.skipped.add(self.split, self.row_of[index], file_of_image(self._cell(index)), reason)

    def _no_readable_image(self, error: OSError) -> InputError:
        return InputError(
            f"No image of the {self.split[:100]} split can be read: {one_line(error, 330)} Check the files, or the "
            f"column {self.source.image_column[:50]!r}."
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which changes the augmentation."""
        self.epoch.fill_(epoch)

    def keep_columns(self, names: Iterable[str]) -> None:
        """Let each row have the cells of other columns of the data set, as `columns`, if the columns exist."""
        existing = [name for name in sorted(names) if name in self.rows.column_names]
        self.other_columns = self.rows.select_columns(existing) if existing else None

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
        """Return the image of a row for display, or a grey image if only its features exist.

        A video is shown by its middle frame.
        """
        if self.images is not None:
            try:
                return middle_frame(self._open_image(self.indices[position]))
            except OSError:  # the file was deleted after its features were computed
                pass
        return Image.new("RGB", (64, 64), "lightgray")

    def references(self) -> list[list[str]]:
        """Return the captions of each row."""
        return [self.captions[index] for index in self.indices]

    def row_prompts(self) -> list[str]:
        """Return the prompt of each row. An empty prompt is that of the captioner."""
        return [self.prompts[index] for index in self.indices]

    def column(self, name: str) -> list:
        """Return the values of another column of the data set, one for each row."""
        values = self.rows[name]
        return [values[self.row_of[index]] for index in self.indices]


def no_caption(source: CaptionSource) -> InputError:
    """Return the error for columns without captions, with what they hold instead."""
    existing = source.rows.column_names
    columns = caption_columns(source.caption_column, existing)
    rows = with_nested_columns(source.rows, *columns)
    cells = (cell for column in columns for cell in rows[column])
    held = next(filter(lambda held: held != "nothing", map(describe, cells)), "nothing")
    return InputError(
        f"No row of the {source.name} split has a caption in its column {','.join(columns)!r}, which holds {held}; the "
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
        index = self.dataset.indices[position]
        row: CaptionRow = {**self.dataset[self.image_of[position]], "captions": self.dataset.captions[index]}
        if self.dataset.prompts[index]:
            row["prompt"] = self.dataset.prompts[index]
        else:
            row.pop("prompt", None)
        return row
