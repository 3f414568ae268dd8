"""State of a running server: loading, ready or draining, and the way of a request through it."""

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import Request

from ..common.logging import get_logger
from .batching import Batcher, CaptionedRequest, Result, Row
from .errors import ApiError, ClientGone
from .images import ImageReader
from .model_thread import ServedModel
from .options import ServingOptions
from .requests import CaptionRequest, RequestShape, generation_options, read_json

if TYPE_CHECKING:
    from ..captioning_qformer import QFormerCaptioningModel

logger = get_logger(__name__)

MAX_DECODERS = 4  # threads that decode requests and images


class Service:
    """A captioner that answers requests.

    Args:
        load: function that loads the captioner. It runs in the thread of the model.
        options: options of the server.
        on_failure: function that is called if loading fails; `failure` is then the error.
    """

    def __init__(
        self,
        load: Callable[[], "QFormerCaptioningModel"],
        options: ServingOptions,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self.load, self.options, self.on_failure = load, options, on_failure
        self.status = "loading"  # then "ready" and "draining"
        self.failure: Exception | None = None
        self.model: ServedModel | None = None
        self.model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.decoders = ThreadPoolExecutor(min(MAX_DECODERS, os.cpu_count() or 1), thread_name_prefix="decoder")
        self.batcher = Batcher(self.caption_batch, options.max_batch_size, options.max_wait_ms / 1000)
        self.images = ImageReader(options, self.decoders)
        self.num_reading = self.num_waiting = 0
        self.batcher.metrics.count_reading(lambda: self.num_reading)
        self.tasks: list[asyncio.Task] = []

    # --- Life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the captioner and to caption."""
        self.tasks = [asyncio.create_task(self.get_ready()), asyncio.create_task(self.batcher.serve())]

    async def get_ready(self) -> None:
        """Load the captioner."""
        try:
            self.model = await self.in_model_thread(lambda: ServedModel(self.load(), self.options.max_new_tokens))
        except Exception as error:  # the command raises it in its main thread
            self.failure = error
            self.on_failure()
            return
        self.images.max_images = self.model.max_images
        if self.status == "loading":
            self.status = "ready"
            logger.info("The captioner %r is ready.", self.options.name)

    async def drain(self) -> None:
        """Refuse new requests, and wait until those that are here are answered, or `drain_timeout` has passed."""
        self.status = "draining"
        self.batcher.stop_waiting()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_timeout):
                while self.num_reading or self.num_waiting:
                    await asyncio.sleep(0.02)
        if self.num_reading or self.num_waiting:
            logger.warning("%d requests were not answered.", self.num_reading + self.num_waiting)

    def stop(self) -> None:
        """End all tasks and threads."""
        self.status = "draining"
        for task in self.tasks:
            task.cancel()
        for threads in (self.model_thread, self.decoders):
            threads.shutdown(wait=False, cancel_futures=True)

    # --- The way of a request -----------------------------------------------------------------------------------------

    async def receive(self, request: Request, shape: type[RequestShape]) -> CaptionRequest:
        """Return the request that a client sends.

        Args:
            request: the request of HTTP.
            shape: the shape that its body should have.

        Raises:
            ApiError: if it is refused, too large, too slow or wrong.
            ClientGone: if the client leaves.
        """
        self.check_ready()
        if max(self.num_reading, self.num_waiting) >= self.options.max_queue_size:
            raise ApiError(429, "The queue of the server is full: try again.", code="queue_full", close=True)
        self.num_reading += 1
        try:
            body = await self.read_body(request)
            loop = asyncio.get_running_loop()
            wanted = await loop.run_in_executor(self.decoders, read_json, body, shape)
        finally:
            self.num_reading -= 1
        name = self.options.name
        if wanted.model is not None and wanted.model.removesuffix(":latest") != name:
            raise ApiError(
                404, f"There is no model {wanted.model[:100]!r}: use {name!r}.", "model", code="model_not_found"
            )
        return wanted

    def check_ready(self) -> None:
        """Check that requests are accepted.

        Raises:
            ApiError: while the captioner is loaded, and while the server stops.
        """
        if self.status == "loading":
            raise ApiError(503, "The captioner is being loaded: try again.", code="loading", close=True)
        if self.status == "draining":
            raise ApiError(503, "The server is being stopped: try another one.", code="draining", close=True)

    async def read_body(self, request: Request) -> bytes:
        """Return the body of a request.

        Raises:
            ApiError: if it is too large or too slow.
            ClientGone: if the client leaves.
        """
        limit = self.options.max_body_bytes
        announced = request.headers.get("content-length", "0")
        body, more = bytearray(), True
        is_too_large = announced.isdecimal() and int(announced[:20]) > limit
        try:
            async with asyncio.timeout(self.options.read_timeout):
                while more and not is_too_large:
                    message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    is_too_large = len(body) > limit
        except TimeoutError:
            raise ApiError(
                408,
                f"The request took more than {self.options.read_timeout:g} seconds to arrive: send it again.",
                code="timeout",
                close=True,
            ) from None
        if is_too_large:
            raise ApiError(
                413, f"The request has more than {limit:,} bytes: send a smaller image.", code="too_large", close=more
            )
        return bytes(body)

    async def answer(self, request: Request, wanted: CaptionRequest) -> CaptionedRequest:
        """Return the captions of a request.

        Args:
            request: the request of HTTP, which has been read.
            wanted: the request that it holds.

        Raises:
            ApiError: if an image cannot be read, or the captioner refuses the request.
            ClientGone: if the client leaves.
        """
        with self.waiting():
            work = asyncio.create_task(self.caption(wanted))
            left = asyncio.create_task(wait_until_gone(request))
            try:
                await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientGone
                return work.result()
            finally:
                for task in (work, left):
                    task.cancel()
                await asyncio.gather(work, left, return_exceptions=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count a request among those that wait.

        Raises:
            ApiError: if there are too many.
        """
        if self.num_waiting >= self.options.max_queue_size:
            raise ApiError(429, "The queue of the server is full: try again.", code="queue_full")
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1

    async def caption(self, wanted: CaptionRequest) -> CaptionedRequest:
        """Read the images of a request and caption them. If this is cancelled, the row leaves the queue.

        Raises:
            ApiError: if an image cannot be read, or the captioner refuses the request.
        """
        assert self.model is not None
        options = self.options
        generation = generation_options(wanted, options.num_beams, options.max_new_tokens, self.limit)
        seed = wanted.seed if generation.get("do_sample", self.model.samples) else None
        prompt = wanted.prompt if wanted.prompt and not options.ignore_text else options.prompt or ""
        async with self.images.open(wanted.sources, wanted.param, wanted.allows_base64) as images:
            image: Any = images[0] if len(images) == 1 else images
            row = Row(image, prompt, generation, seed)
            self.batcher.submit(row)
            try:
                result: Result = await row.future
            finally:
                self.batcher.discard(row)
        if isinstance(result, Exception):
            raise result
        return result

    @property
    def limit(self) -> int:
        """Largest number of tokens of a caption."""
        assert self.model is not None
        return self.model.limit

    async def caption_batch(self, rows: Sequence[Row]) -> Sequence[Result]:
        """Caption rows in the thread of the model."""
        assert self.model is not None
        return await self.in_model_thread(lambda: self.model.caption(rows))  # type: ignore[union-attr]

    async def in_model_thread(self, function: Callable[[], Any]) -> Any:
        """Call a function in the thread of the model."""
        return await asyncio.get_running_loop().run_in_executor(self.model_thread, function)


async def wait_until_gone(request: Request) -> None:
    """Wait until the client of a request that has been read closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
