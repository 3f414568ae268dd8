"""Captioning of many images: batches, the processes that share them, and the outputs that they are written to."""

import dataclasses
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from .items import Item, KeySet, hash_of
from .loader import ImageLoader
from .outputs import OutputRow
from .rows import caption_rows
from .sidecars import Sidecars, has_text
from .writer import Writer

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel

BATCHES_PER_ROUND = 4  # of each of several processes, between two moments at which they wait for each other
MAX_SEED = 2**63


class Processes:
    """Processes of a run, which exchange Python objects.

    Args:
        state: this process and its place among the others.
    """

    def __init__(self, state: PartialState):
        self.state, self.number, self.index = state, state.num_processes, state.process_index
        self.is_main = state.is_main_process
        self.group = None
        if self.number > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=2))

    def scatter(self, parts: list[Any] | None) -> Any:
        """Return the part of this process.

        Args:
            parts: a part for each process, in the main process; `None` in the others.
        """
        if self.group is None:
            assert parts is not None
            return parts[0]
        own: list[Any] = [None]
        torch.distributed.scatter_object_list(own, parts, src=0, group=self.group)
        return own[0]

    def gather(self, part: Any) -> list[Any] | None:
        """Return the parts of all processes in the main process, and `None` in the others."""
        if self.group is None:
            return [part]
        parts = [None] * self.number if self.is_main else None
        torch.distributed.gather_object(part, parts, dst=0, group=self.group)
        return parts

    def end(self) -> None:
        """Leave the group of processes."""
        if self.number > 1:
            torch.distributed.barrier(group=self.group)
            torch.distributed.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Captioning:
    """Captioner of batches, with its options.

    Args:
        model: the captioner.
        prompt: text that the captions continue.
        score: compute scores, too.
        prefix: text in front of each caption.
        suffix: text behind each caption.
        seed: seed of sampling. Each batch begins with a seed of its own, which depends on its first image.
        generation: options of the captioner's `generate`.
    """

    model: "QFormerCaptioningModel"
    prompt: str | None = None
    score: bool = False
    prefix: str = ""
    suffix: str = ""
    seed: int = 0
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)

    def caption(self, rows: list[Any]) -> list[OutputRow]:
        """Caption a batch of opened items."""
        torch.manual_seed(hash_of(rows[0].item.key, self.seed) % MAX_SEED)
        images = [row.image for row in rows]
        captioned = caption_rows(self.model, images, self.prompt, score=self.score, **self.generation)
        for row in captioned:
            row.captions = [f"{self.prefix}{caption}{self.suffix}" for caption in row.captions]
        return [OutputRow(own.item, row, own.content) for own, row in zip(rows, captioned, strict=True)]


class Wanted:
    """Items that need a caption, out of all items of a source.

    Args:
        items: all items.
        writer: the outputs with their record, which knows the items that have been captioned. If texts beside images
            are the only output, an item whose text was deleted is captioned again.

    Attributes:
        num_skipped (`int`): number of items that have a caption.
        num_repeated (`int`): number of items that occurred before.
        num_lost (`int`): number of items in the record whose text was deleted.
    """

    def __init__(self, items: Iterator[Item], writer: Writer):
        self.items, self.writer = items, writer
        self.sidecars = next((output for output in writer.outputs if isinstance(output, Sidecars)), None)
        self.num_skipped = self.num_repeated = self.num_lost = 0

    def __iter__(self) -> Iterator[Item]:
        seen, done, failed = KeySet(), self.writer.done, self.writer.failed
        for item in self.items:
            if not seen.add(item.key):
                self.num_repeated += 1
                continue
            if self.sidecars is not None:
                item = self.sidecars.named(item)
            if item.key in failed:
                continue
            if item.key in done:
                if not self.writer.is_of_texts or has_text(item):
                    continue
                self.num_lost += 1
            if self.sidecars is not None and self.sidecars.is_captioned(item):
                self.num_skipped += 1
                continue
            yield item


def caption_items(
    items: Iterator[Item] | None,
    captioning: Captioning,
    loader: ImageLoader,
    processes: Processes,
    batch_size: int,
    write: Callable[[list[OutputRow]], None],
) -> None:
    """Caption items in batches, and write each batch.

    Batches consist of items that follow each other, whatever the number of processes, and are written in order. While
    batches are captioned, the images of the next ones are opened.

    Args:
        items: the items, in the main process; `None` in the others.
        captioning: what makes the captions.
        loader: what opens the images.
        processes: the processes that share the batches.
        batch_size: number of items in a batch.
        write: function that writes a batch, in the main process.
    """
    rounds = deal(items, processes, batch_size)
    loading = [loader.submit(batch) for batch in next(rounds, [])]
    while loading:
        following = [loader.submit(batch) for batch in next(rounds, [])]
        captioned = [captioning.caption([row.result() for row in batch]) for batch in loading if batch]
        parts = processes.gather(captioned)
        for number in range(max(map(len, parts or [[]]))):
            for part in parts or []:
                if number < len(part):
                    write(part[number])
        loading = following


def deal(items: Iterator[Item] | None, processes: Processes, batch_size: int) -> Iterator[list[list[Item]]]:
    """Yield the batches of this process in each round. In each round at least one process has a batch.

    Args:
        items: the items, in the main process; `None` in the others.
        processes: the processes that share the batches.
        batch_size: number of items in a batch.
    """
    number = processes.number
    per_round = 1 if number == 1 else number * BATCHES_PER_ROUND
    while True:
        parts = None
        if items is not None:
            dealt = list(filter(None, (list(islice(items, batch_size)) for _ in range(per_round))))
            parts = [dealt[index::number] or [[]] * bool(dealt) for index in range(number)]
        own = processes.scatter(parts)
        if not own:
            return
        yield own
