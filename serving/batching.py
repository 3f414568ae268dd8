"""Dynamic batches: rows of several requests that are captioned at once.

The event loop collects rows, and one thread runs the model. While a batch runs, the next rows wait in the queue.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from .metrics import Metrics


@dataclass
class CaptionedRequest:
    """Captions of a request.

    Args:
        captions: the captions.
        tokens: number of tokens of each caption.
        prompt_tokens: number of tokens of the prompt.
    """

    captions: list[str]
    tokens: list[int]
    prompt_tokens: int


Result = CaptionedRequest | Exception


@dataclass(eq=False)
class Row:
    """A request that waits for its captions.

    Args:
        image: the image, or the frames of a video.
        prompt: text that the captions continue; empty for the captioner's own.
        generation: options of `generate`. Only rows with equal options share a batch.
        seed: seed of sampling. A row with a seed is alone in its batch, so that others do not change its samples.
        future: receives the result.
        arrived: time of arrival, by `time.monotonic`.
    """

    image: Any
    prompt: str
    generation: dict[str, Any]
    seed: int | None = None
    future: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    arrived: float = field(default_factory=time.monotonic)

    @property
    def count(self) -> int:
        """Number of captions."""
        return self.generation.get("num_return_sequences", 1)

    def shares_batch_with(self, other: "Row") -> bool:
        """Return whether two rows can be captioned at once."""
        return self is other or (self.seed is None and other.seed is None and self.generation == other.generation)


class Batcher:
    """Queue of rows, which [`~Batcher.serve`] captions in batches.

    Args:
        caption: coroutine that captions the rows of a batch, and returns a result for each.
        max_batch_size: largest number of captions of a batch. A row that asks for more is alone in its batch.
        max_wait: seconds that a row waits for others, counted from its arrival.
    """

    def __init__(
        self, caption: Callable[[Sequence[Row]], Awaitable[Sequence[Result]]], max_batch_size: int, max_wait: float
    ):
        self.caption, self.max_batch_size, self.max_wait = caption, max_batch_size, max_wait
        self.rows: deque[Row] = deque()
        self.changed = asyncio.Event()
        self.metrics = Metrics(lambda: len(self.rows))

    def submit(self, row: Row) -> None:
        """Add a row to the queue."""
        self.rows.append(row)
        self.changed.set()

    def discard(self, row: Row) -> None:
        """Drop a row whose client has left. A row whose batch has begun is not affected."""
        if row in self.rows:
            self.rows.remove(row)
            self.changed.set()

    def stop_waiting(self) -> None:
        """Caption rows from now on without waiting for others."""
        self.max_wait = 0.0
        self.changed.set()

    async def serve(self) -> None:
        """Caption rows until cancelled."""
        while True:
            await self.collect()
            batch = self.take()
            if not batch:  # their clients have left
                continue
            start = time.perf_counter()
            try:
                results = await self.caption(batch)
            except Exception as error:
                results = [error] * len(batch)
            self.metrics.batch_seconds.observe(time.perf_counter() - start)
            self.metrics.batches.observe(sum(row.count for row in batch))
            for row, result in zip(batch, results, strict=True):
                if isinstance(result, CaptionedRequest):
                    self.metrics.captions.inc(len(result.captions))
                    self.metrics.tokens.inc(sum(result.tokens))
                if not row.future.done():
                    row.future.set_result(result)

    async def collect(self) -> None:
        """Wait until there is a full batch, or the oldest row has waited long enough."""
        while not self.rows:
            self.changed.clear()
            await self.changed.wait()
        while self.rows and not self.is_full():
            left = self.rows[0].arrived + self.max_wait - time.monotonic()
            if left <= 0:
                return
            self.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.changed.wait()

    def is_full(self) -> bool:
        """Return whether no further row would fit beside the oldest."""
        return sum(row.count for row in self.rows if row.shares_batch_with(self.rows[0])) >= self.max_batch_size

    def take(self) -> list[Row]:
        """Remove from the queue the oldest row and those that can be captioned with it, in order of arrival."""
        batch: list[Row] = []
        size = 0
        for row in list(self.rows):
            if batch and not row.shares_batch_with(batch[0]):
                continue
            if batch and size + row.count > self.max_batch_size:
                break
            batch.append(row)
            size += row.count
        for row in batch:
            self.rows.remove(row)
        return batch
