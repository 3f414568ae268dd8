"""Stream of images with captions, whose rows are read during training."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from ..common.errors import InputError
from .augmentation import Augmentation
from .columns import column_names, missing_column, nested_value
from .dataset import CaptionRow, CaptionSource
from .images import Picture, file_of_image, image_cell, open_cell
from .loading import PEEK_ROWS, iterate_rows
from .skip_limit import STREAM_ROWS, SkipLimit, try_images
from .skipped_rows import SkippedRows
from .texts import Text, caption_columns, texts_in_row


class CaptionStream(IterableDataset[CaptionRow]):
    """Endless stream of images with captions, mixed from one or several sources.

    After its last row, a source starts again in another order. The stream has no end, because the processes of a run
    would reach an end at different times. The length of a run is therefore a number of steps.

    In each pass over a source, every row is read by one reader. A reader is one data loader worker of one process. If a
    source has at least as many files as there are readers, each reads its own files. Otherwise all readers read all
    files, and each opens its share of the images.

    The order depends only on the seed, so an interrupted run resumes with the same rows.

    Args:
        sources: the data sets. Their rows are `datasets.IterableDataset` with undecoded images.
        skipped: record of the rows that cannot be used, filled in the first pass. The rows of a stream have no numbers.
        augmentation: random changes to the rows, and the random seed of their order.
        weights: weight of each source. At any time, the share of rows from a source is as close to its weight as
            possible. By default all weights are equal.
        shuffle_buffer: size of the buffer in which rows are shuffled. Files are shuffled as well. 0 keeps the order.
        max_rows: largest number of rows of each source, taken from its beginning; by default all.
        process_index: index of this process.
        num_processes: number of processes of the run.

    Raises:
        InputError: if a column does not exist. While iterating: if a file cannot be read, or no row can be used.
    """

    def __init__(
        self,
        sources: Sequence[CaptionSource],
        skipped: SkippedRows,
        augmentation: Augmentation | None = None,
        weights: Sequence[float] | None = None,
        shuffle_buffer: int = 1000,
        max_rows: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        sources = [source.with_existing_columns() for source in sources]
        for source in sources:
            columns = column_names(source.rows)
            asked = [("image_column", source.image_column), ("prompt_column", source.prompt_column)]
            asked += [("caption_column", column) for column in caption_columns(source.caption_column, columns)]
            for option, column in asked:
                if column is not None and not {column, column.split(".")[0]} & set(columns):
                    raise missing_column(column, columns, f"{source.option_prefix}{option}")
        self.sources = sources
        self.skipped = skipped
        self.augmentation = augmentation or Augmentation()
        weights = weights or [1.0] * len(sources)
        self.shares = [weight / sum(weights) for weight in weights]
        self.shuffle_buffer = shuffle_buffer
        self.max_rows = max_rows
        self.process_index = process_index
        self.num_processes = num_processes
        self.other_columns: set[str] = set()

    def check_images(self, limit: SkipLimit) -> None:
        """Open the images of the first thousand rows of each source.

        Raises:
            InputError: if the images of too many rows cannot be read.
        """
        for source in self.sources:
            rows = iterate_rows(source.rows.take(min(STREAM_ROWS, self.max_rows or STREAM_ROWS)), source.name)
            errors = [error for _, error in try_images(rows, functools.partial(self._open_image, source))]
            limit.check(source.name, len(errors), len(errors), [error for error in errors if error is not None])

    def _open_image(self, source: CaptionSource, row: dict[str, Any]) -> Picture:
        return open_cell(image_cell(nested_value(row, source.image_column)), source.image_folder, source.num_frames)

    def set_epoch(self, epoch: int) -> None:
        """Do nothing, because a stream counts its passes itself."""

    def keep_columns(self, names: Iterable[str]) -> None:
        """Let each row have the cells of other columns of its source, as `columns`, if the columns exist."""
        self.other_columns = set(names)

    def __iter__(self) -> Iterator[CaptionRow]:
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        reader, num_readers = self.process_index * num_workers + worker_id, self.num_processes * num_workers
        rows = [self._read(number, reader, num_readers) for number in range(len(self.sources))]
        shown = [0] * len(rows)
        for total in itertools.count(1):
            behind = [share * total - count for share, count in zip(self.shares, shown, strict=True)]
            number = behind.index(max(behind))
            shown[number] += 1
            yield next(rows[number])

    def _read(self, number: int, reader: int, num_readers: int) -> Iterator[CaptionRow]:
        """Yield one reader's rows of a source, pass after pass."""
        source = self.sources[number]
        for epoch in itertools.count():
            last_error, readable = None, False
            rows = self._one_pass(source, epoch, reader, num_readers)
            texts = ((row, text) for row in rows for text in texts_of_source(source, row))
            for count, (row, text) in enumerate(texts):
                # The place is different for all rows of a pass, and seeds the augmentation.
                place = (count * num_readers + reader) * len(self.sources) + number
                try:
                    prepared = self._prepare(source, row, text, epoch, place)
                except OSError as error:
                    last_error = error
                    if epoch == 0:
                        file = file_of_image(nested_value(row, source.image_column))
                        self.skipped.add(source.name, None, file, str(error), place=place)
                else:
                    readable = True
                    yield prepared
            if not readable:
                raise no_usable_row(source.name, last_error, num_readers)

    def _one_pass(self, source: CaptionSource, epoch: int, reader: int, num_readers: int) -> Iterator[dict[str, Any]]:
        """Yield one reader's rows of one pass over a source, without opening images."""
        rows = source.rows
        if self.max_rows is not None:
            rows = rows.take(self.max_rows)
        if self.shuffle_buffer > 1:
            rows = rows.shuffle(seed=self.augmentation.seed + epoch, buffer_size=self.shuffle_buffer)
        by_files = rows.num_shards >= num_readers and self.max_rows is None
        rows = split_dataset_by_node(rows, reader, num_readers, "shards" if by_files else "examples")
        return iterate_rows(rows, source.name)

    def _prepare(self, source: CaptionSource, row: dict[str, Any], text: Text, epoch: int, place: int) -> CaptionRow:
        """Open the image of a row, and augment the row.

        Raises:
            OSError: if the row has no caption, or its image cannot be read.
        """
        if not text.captions:
            raise OSError(text.reason)
        image = self._open_image(source, row)
        generator = self.augmentation.generator(epoch, place)
        image = self.augmentation.augment(image, generator)
        prepared: CaptionRow = {"image": image, **self.augmentation.draw_text(text.captions, generator, text.prompt)}
        if self.other_columns:
            prepared["columns"] = {name: row[name] for name in sorted(self.other_columns & row.keys())}
        return prepared

    def references(self) -> Iterator[list[str]]:
        """Yield the captions of the first rows of each source, 10,000 rows in all."""
        for text in self._first_texts():
            yield text.captions

    def row_prompts(self) -> Iterator[str]:
        """Yield the prompts of the same rows. An empty prompt is that of the captioner."""
        for text in self._first_texts():
            yield text.prompt

    def _first_texts(self) -> Iterator[Text]:
        for source in self.sources:
            existing = column_names(source.rows)
            asked = [*caption_columns(source.caption_column, existing), *filter(None, [source.prompt_column])]
            columns = {column if column in existing else column.split(".")[0] for column in asked}
            rows = source.rows.select_columns(sorted(columns)).take(PEEK_ROWS // len(self.sources))
            for row in iterate_rows(rows, source.name):
                yield from texts_of_source(source, row)


def texts_of_source(source: CaptionSource, row: dict[str, Any]) -> list[Text]:
    """Return the texts of a row of a stream."""
    cells = [nested_value(row, column) for column in caption_columns(source.caption_column, row)]
    return texts_in_row(cells, None if source.prompt_column is None else nested_value(row, source.prompt_column))


def no_usable_row(name: str, last_error: Exception | None, num_readers: int) -> InputError:
    """Return the error for a pass without a usable row.

    Args:
        name: name of the source.
        last_error: why the last row could not be used; `None` if the reader did not get a row.
        num_readers: number of readers that share the rows.
    """
    if last_error is not None:
        return InputError(f"No row of {name} can be used; the reason for the last one: {last_error}")
    if num_readers > 1:
        return InputError(
            f"{name} has too few rows for {num_readers} processes that read: use fewer --dataloader_num_workers, or do "
            "without --streaming."
        )
    return InputError(f"{name} has no rows.")
