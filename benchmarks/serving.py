"""Latency and throughput of the server, with dynamic batches and without: `python -m benchmarks.serving`.

Clients send images of mixed sizes, each as soon as it has the answer to its last request. One request in ten is
broken: a truncated image, a body that is too large, wrong JSON, a client that stalls, or one that leaves. Statuses must
be the documented ones, and captions are compared with those of `caption()`. The captioner joins pretrained backbones by
a random Q-Former, so its captions have no meaning and the largest length.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .common import machine_facts, write_result

CHAT = "/v1/chat/completions"
SIZES = ((64, 64), (224, 224), (640, 480), (1024, 768), (1600, 1200))  # width and height
BROKEN = {"truncated": {422}, "too large": {413}, "wrong JSON": {400}, "stalls": {408}, "leaves": {None}}
MAX_BODY_BYTES = 2_000_000
READ_TIMEOUT = 1  # seconds


@dataclass(frozen=True)
class Case:
    """A request.

    Args:
        kind: "caption", or a key of `BROKEN`.
        body: what the client sends.
        image: number of the image.
    """

    kind: str
    body: bytes
    image: int


@dataclass(frozen=True)
class Outcome:
    """Answer to a request.

    Args:
        kind: kind of the request.
        image: number of its image.
        status: HTTP status, or `None` without an answer.
        caption: the caption.
        seconds: time from the connection to the answer.
    """

    kind: str
    image: int
    status: int | None
    caption: str | None
    seconds: float


def make_images(number: int) -> list[bytes]:
    """Return JPEG files of mixed sizes."""
    generator = np.random.default_rng(1)
    files = []
    for index in range(number):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files


def chat_body(content: bytes, model: str) -> bytes:
    """Return the body of a chat completion about an image file."""
    url = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    return json.dumps({"model": model, "messages": [message]}).encode()


def make_cases(images: Sequence[bytes], model: str, number: int, broken: bool = True) -> list[Case]:
    """Return requests, of which each tenth is broken.

    Args:
        images: image files.
        model: name of the model.
        number: number of requests.
        broken: whether there are broken requests.
    """
    cases, kinds = [], list(BROKEN)
    for index in range(number):
        image = index % len(images)
        body = chat_body(images[image], model)
        kind = kinds[index // 10 % len(kinds)] if broken and index % 10 == 9 else "caption"
        if kind == "truncated":
            body = chat_body(images[image][: len(images[image]) // 2], model)
        elif kind == "too large":
            body = chat_body(bytes(MAX_BODY_BYTES), model)
        elif kind == "wrong JSON":
            body = body[:-10]
        cases.append(Case(kind, body, image))
    random.Random(1).shuffle(cases)
    return cases


async def send(case: Case, host: str, port: int) -> Outcome:
    """Send a request over a connection of its own, and return its answer."""
    start = time.perf_counter()
    status, content = None, b""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    body = case.body[: len(case.body) // 2] if case.kind == "stalls" else case.body
    with contextlib.suppress(ConnectionError):  # a refused request may be answered before it has been read
        writer.write(f"{head}Content-Length: {len(case.body)}\r\n\r\n".encode() + body)
        await writer.drain()
    if case.kind != "leaves":
        with contextlib.suppress(ConnectionError):
            status, content = await read_answer(reader)
    writer.close()
    caption = json.loads(content)["choices"][0]["message"]["content"] if status == 200 else None
    return Outcome(case.kind, case.image, status, caption, time.perf_counter() - start)


async def read_answer(reader: asyncio.StreamReader) -> tuple[int | None, bytes]:
    """Return the status of an answer and its content, or no status if the connection ends before."""
    first = await reader.readline()
    if not first:
        return None, b""
    while (await reader.readline()).strip():
        pass
    return int(first.split()[1]), await reader.read()


async def send_all(cases: Sequence[Case], host: str, port: int, clients: int) -> tuple[list[Outcome], float]:
    """Send requests from several clients at once.

    Returns:
        The outcomes, and the seconds that all took.
    """
    waiting, outcomes = iter(cases), []

    async def client() -> None:
        for case in waiting:
            outcomes.append(await send(case, host, port))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes, time.perf_counter() - start


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Check that every request got a documented status.

    Raises:
        SystemExit: if one did not.
    """
    expected = {**BROKEN, "caption": {200}}
    wrong = Counter((each.kind, each.status) for each in outcomes if each.status not in expected[each.kind])
    if wrong:
        raise SystemExit(f"These answers have a wrong status: {dict(wrong)}.")


@contextlib.contextmanager
def running_server(folder: str, max_batch_size: int, *more: str) -> Iterator[tuple[str, int]]:
    """Run the server in a process of its own, and yield its host and port.

    Args:
        folder: the captioner.
        max_batch_size: largest number of captions of a batch.
        more: further words of the command line.

    Raises:
        SystemExit: if it does not end with status 0 after SIGTERM.
    """
    command = [sys.executable, "-m", "qformer_captioner.cli.main", "serve", "--model", folder, "--port", "0"]
    command += ["--max_batch_size", str(max_batch_size), "--max_body_bytes", str(MAX_BODY_BYTES)]
    command += ["--read_timeout", str(READ_TIMEOUT), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        match = re.search(r"http://([^:]+):(\d+)", process.stdout.readline())
        if match is None:
            raise SystemExit("The server did not start.")
        host, port = match[1], int(match[2])
        wait_until_ready(host, port)
        yield host, port
    finally:
        process.terminate()
        status = process.wait()
    if status != 0:
        raise SystemExit(f"The server ended with status {status}.")


def wait_until_ready(host: str, port: int, seconds: float = 300) -> None:
    """Wait until a server has loaded its captioner.

    Raises:
        TimeoutError: if that takes too long.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{host}:{port}/health", timeout=10):
            return
        time.sleep(0.1)
    raise TimeoutError("The server is not ready.")


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def measure(
    folder: str, images: Sequence[bytes], captions: Sequence[str], options: argparse.Namespace, max_batch_size: int
) -> dict[str, Any]:
    """Load a server of its own with requests, and return what was measured.

    Args:
        folder: the captioner.
        images: image files.
        captions: the caption of each by `caption()`.
        options: the command line.
        max_batch_size: largest number of captions of a batch.
    """
    number = options.requests if max_batch_size > 1 else options.unbatched_requests
    cases = make_cases(images, Path(folder).name, number)
    with running_server(folder, max_batch_size, "--max_new_tokens", str(options.max_new_tokens)) as (host, port):
        asyncio.run(send_all(make_cases(images, Path(folder).name, max_batch_size, False), host, port, options.clients))
        outcomes, seconds = asyncio.run(send_all(cases, host, port, options.clients))
    check_outcomes(outcomes)
    answered = [each for each in outcomes if each.kind == "caption"]
    times = [each.seconds for each in answered]
    result = {
        "max_batch_size": max_batch_size,
        "requests": number,
        "seconds": seconds,
        "captions_per_second": len(answered) / seconds,
        "p50": percentile(times, 50),
        "p95": percentile(times, 95),
        "differing": sum(each.caption != captions[each.image] for each in answered),
        "statuses": {f"{kind}: {status}": count for (kind, status), count in sorted(kinds_of(outcomes).items())},
    }
    print(
        f"  at most {max_batch_size:>3} in a batch: {result['captions_per_second']:.2f} captions/s, p50 "
        f"{result['p50']:.2f} s, p95 {result['p95']:.2f} s, {result['differing']} of {len(answered)} captions differ "
        f"from caption()'s"
    )
    print(f"    {result['statuses']}")
    return result


def kinds_of(outcomes: Sequence[Outcome]) -> Counter:
    """Count outcomes by kind and status."""
    return Counter((each.kind, str(each.status)) for each in outcomes)


def build(options: argparse.Namespace, folder: str) -> None:
    """Write the captioner: two backbones and a random Q-Former."""
    import torch

    from qformer_captioner import QFormerCaptioner

    torch.manual_seed(1)
    model = QFormerCaptioner.from_backbones(options.vision, options.language, num_query_tokens=16, num_hidden_layers=4)
    torch.nn.init.normal_(model.language_projection.weight, std=0.2)  # captions then depend on the image
    model.save_pretrained(folder, include_backbones=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vision", default="facebook/dinov2-small", help="Vision encoder, as a Hub id or folder.")
    parser.add_argument("--language", default="HuggingFaceTB/SmolLM2-135M", help="Language model.")
    parser.add_argument("--requests", type=int, default=2000, help="Number of requests.")
    parser.add_argument("--unbatched_requests", type=int, default=400, help="Number of requests without batches.")
    parser.add_argument("--images", type=int, default=20, help="Number of different images.")
    parser.add_argument("--clients", type=int, default=64, help="Number of clients.")
    parser.add_argument("--max_batch_size", type=int, default=16, help="Largest number of captions of a batch.")
    parser.add_argument("--max_new_tokens", type=int, default=20, help="Largest number of tokens of a caption.")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    images = make_images(options.images)
    with tempfile.TemporaryDirectory() as name:
        folder = str(Path(name) / "captioner")
        build(options, folder)
        from qformer_captioner.hub.load import load_captioner

        model = load_captioner(folder)
        captions = [model.caption(image, max_new_tokens=options.max_new_tokens) for image in images]
        del model
        print(f"{options.requests} requests of {options.clients} clients, one in ten broken")
        batched = measure(folder, images, captions, options, options.max_batch_size)
        single = measure(folder, images, captions, options, 1)
    ratio = batched["captions_per_second"] / single["captions_per_second"]
    print(f"  batches answer {ratio:.2f} x as many requests")
    facts = machine_facts("qformer-captioner", "transformers", "torch", "fastapi", "uvicorn")
    shape = {"clients": options.clients, "max_new_tokens": options.max_new_tokens, "images": len(images)}
    shape |= {"vision": Path(options.vision).name, "language": Path(options.language).name}
    write_result("serving", facts | shape | {"batched": batched, "unbatched": single, "ratio": ratio})


if __name__ == "__main__":
    main()
