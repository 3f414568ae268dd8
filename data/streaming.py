"""Captioned rows that are read while training goes on, and never all at once."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from ..common.errors import InputError
from .augmentation import Augmentation
from .dataset import captions_of, no_such_column
from .images import open_cell
from .loading import PEEK, columns_of, rows_of
from .skipped_rows import SkippedRows


@dataclass
class StreamSource:
    """A data set to stream from.

    Args:
        name: of the data set and split, in messages and in the record of skipped rows.
        rows: its rows, images undecoded, as [`load_rows`] gives them.
        image_column, caption_column: hold what the columns of a [`CaptionDataset`] hold.
        image_folder: paths of images must lie inside this folder; by default they may lie anywhere.
        max_rows: stream so many of its rows, the first ones; by default all.
    """

    name: str
    rows: datasets.IterableDataset
    image_column: str
    caption_column: str
    image_folder: Path | None = None
    max_rows: int | None = None


class CaptionStream(IterableDataset):
    """The same rows as a [`CaptionDataset`]'s, without an end: behind its last row a data set begins again, reshuffled.

    An end would come at different times in the processes of a run, and the Trainer can go on only with a killed run's
    first pass. So the length of a run is a number of steps. In each pass every row is shown by one process and one of
    its data-loading processes: where there are as many files as those, each reads files of its own, else each opens
    every so many-th image. The order follows from the seed, so a killed run goes on with the same rows.

    Args:
        sources: the data sets.
        skipped: the record of the rows that cannot be used. A row is written down in the first pass only, by its place
            in that pass: which row of the data set it is nobody knows once files and rows are shuffled.
        augmentation: what training shows differently each time.
        weights: which share of the rows comes from which data set, at any time as near as it can be; by default all
            give the same.
        shuffle_buffer: shuffle among so many rows, and the files; 0 keeps the order.
        process, processes: which process of how many this is.

    Raises:
        InputError: if a column is not there; later, if a file cannot be read or no row can be used.
    """

    def __init__(
        self,
        sources: Sequence[StreamSource],
        skipped: SkippedRows,
        augmentation: Augmentation | None = None,
        weights: Sequence[float] | None = None,
        shuffle_buffer: int = 1000,
        process: int = 0,
        processes: int = 1,
    ):
        for source in sources:
            columns = columns_of(source.rows)
            for option, column in (("image_column", source.image_column), ("caption_column", source.caption_column)):
                if column.split(".")[0] not in columns:
                    raise no_such_column(option, column, columns)
        self.sources = sources
        self.skipped = skipped
        self.augmentation = augmentation or Augmentation()
        weights = weights or [1.0] * len(sources)
        self.shares = [weight / sum(weights) for weight in weights]
        self.shuffle_buffer = shuffle_buffer
        self.process = process
        self.processes = processes

    def set_epoch(self, epoch: int) -> None:
        """Nothing: a stream counts its passes by itself."""

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        reader, readers = self.process * workers + (worker.id if worker else 0), self.processes * workers
        rows = [self._read(number, reader, readers) for number in range(len(self.sources))]
        shown = [0] * len(rows)
        for total in itertools.count(1):
            behind = [share * total - number for share, number in zip(self.shares, shown, strict=True)]
            number = behind.index(max(behind))
            shown[number] += 1
            yield next(rows[number])

    def _read(self, number: int, reader: int, readers: int) -> Iterator[dict]:
        """One reader's rows of one data set, pass by pass."""
        source = self.sources[number]
        for epoch in itertools.count():
            last, readable = None, False
            for count, row in enumerate(self._one_pass(source, epoch, reader, readers)):
                index = (count * readers + reader) * len(self.sources) + number  # no two rows of a pass have the same
                cell = as_cell(value_of(row, source.image_column))
                captions = captions_of(value_of(row, source.caption_column))
                try:
                    if not captions:
                        raise OSError("no caption")
                    image = open_cell(cell, source.image_folder)
                except OSError as error:
                    last = error
                    if epoch == 0:
                        self.skipped.add(source.name, None, cell and cell["path"], str(error), place=index)
                    continue
                readable = True
                random = self.augmentation.random(epoch, index)
                image = self.augmentation.vary_image(image, random)
                yield {"image": image, **self.augmentation.vary_text(captions, random)}
            if not readable and last is None:
                raise InputError(
                    f"{source.name} has too few rows for {readers} processes that read: use fewer "
                    "--dataloader_num_workers, or no --streaming."
                    if readers > 1
                    else f"{source.name} has no rows."
                )
            if not readable:
                raise InputError(f"Not one row of {source.name} can be used; of the last one: {last}")

    def _one_pass(self, source: StreamSource, epoch: int, reader: int, readers: int) -> Iterator[dict]:
        rows = source.rows
        if source.max_rows is not None:
            rows = rows.take(source.max_rows)
        if self.shuffle_buffer > 1:
            rows = rows.shuffle(seed=self.augmentation.seed + epoch, buffer_size=self.shuffle_buffer)
        # Where files cannot be shared out, rows are: then all read everything, but each opens images of its own.
        files = rows.num_shards >= readers and source.max_rows is None
        return rows_of(split_dataset_by_node(rows, reader, readers, "shards" if files else "examples"), source.name)

    def references(self) -> Iterator[list[str]]:
        """The captions of the first rows, 10,000 in all."""
        for source in self.sources:
            rows = source.rows.select_columns(source.caption_column.split(".")[0]).take(PEEK // len(self.sources))
            for row in rows_of(rows, source.name):
                yield captions_of(value_of(row, source.caption_column))


def value_of(row: dict, column: str) -> object:
    """The value of a column, which may be one inside another (`json.caption`)."""
    if column in row:
        return row[column]
    for name in column.split("."):
        row = row.get(name) if isinstance(row, dict) else None
    return row


def as_cell(value: dict | bytes | str | None) -> dict | None:
    """An image, as a file of rows may hold it, as an undecoded column holds it."""
    if isinstance(value, dict):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return None if value is None else {"bytes": None, "path": str(value)}
