"""Metrics of the server for Prometheus."""

import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX = "qformer_captioner"


class Metrics:
    """Counters of one server. A request whose client has left before its answer counts with status 499.

    Args:
        queue_length: function that returns the number of requests that wait for a batch.
    """

    def __init__(self, queue_length: Callable[[], int]):
        self.registry = CollectorRegistry()
        here = self.registry
        labels = ("path", "status")
        self.requests = Counter(f"{PREFIX}_requests", "Requests, by address and HTTP status.", labels, registry=here)
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds", "Seconds from request to answer.", ("path",), buckets=SECONDS, registry=here
        )
        self.batches = Histogram(f"{PREFIX}_batch_size", "Captions of a batch.", buckets=ROWS, registry=here)
        self.batch_seconds = Histogram(f"{PREFIX}_batch_seconds", "Seconds of a batch.", buckets=SECONDS, registry=here)
        self.captions = Counter(f"{PREFIX}_captions", "Captions that were generated.", registry=here)
        self.tokens = Counter(f"{PREFIX}_caption_tokens", "Tokens of generated captions.", registry=here)
        queue = Gauge(f"{PREFIX}_queue_length", "Requests that wait for a batch.", registry=here)
        queue.set_function(queue_length)
        self.reading = Gauge(f"{PREFIX}_reading", "Requests that are being received.", registry=here)

    def count_reading(self, number: Callable[[], int]) -> None:
        """Set the function that returns the number of requests that are being received."""
        self.reading.set_function(number)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' format."""
        return generate_latest(self.registry)


class CountRequests:
    """ASGI middleware that counts requests and their seconds.

    Args:
        app: the application.
        metrics: the counters.
        paths: the addresses that are counted by name. Any other is counted as "other".
    """

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request to the application."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, path = time.perf_counter(), scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path, str(message["status"])).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
            await send(message)

        await self.app(scope, receive, counted)
