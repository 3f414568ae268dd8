"""Batches, the bounded queue, clients that leave, and the memory of decoded images."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from qformer_captioner.serving.batching import Batcher, CaptionedRequest, Row
from qformer_captioner.serving.errors import ApiError
from qformer_captioner.serving.images import ImageReader, PixelBudget
from qformer_captioner.serving.options import ServingOptions
from qformer_captioner.serving.requests import CaptionRequest, generation_options

from ..fixtures import tiny
from .requests import picture_url


class Captioner:
    """Stand-in for a model, which records its batches.

    Args:
        seconds: time that a batch takes.
    """

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.batches: list[list[str]] = []

    async def __call__(self, rows: Sequence[Row]) -> list[CaptionedRequest]:
        """Return the prompts of the rows as their captions."""
        self.batches.append([row.prompt for row in rows])
        await asyncio.sleep(self.seconds)
        return [CaptionedRequest([row.prompt], [1], 0) for row in rows]


def batches_of(rows: list[tuple[str, dict, int | None]], max_batch_size: int = 4, max_wait: float = 0.05) -> list:
    """Return the batches in which rows that arrive together are captioned: prompt, options and seed of each."""

    async def run() -> list:
        captioner = Captioner()
        batcher = Batcher(captioner, max_batch_size, max_wait)
        task = asyncio.create_task(batcher.serve())
        submitted = [Row(None, *row) for row in rows]
        for row in submitted:
            batcher.submit(row)
        results = await asyncio.gather(*(row.future for row in submitted))
        assert [result.captions for result in results] == [[prompt] for prompt, _, _ in rows]
        task.cancel()
        return captioner.batches

    return asyncio.run(run())


def test_rows_with_equal_options_share_batches_in_order():
    rows = [(str(number), {}, None) for number in range(6)]
    assert batches_of(rows) == [["0", "1", "2", "3"], ["4", "5"]]


def test_rows_with_other_options_wait_for_their_own_batch():
    beams = {"num_beams": 3}
    rows = [("a", {}, None), ("b", beams, None), ("c", {}, None), ("d", beams, None)]
    assert batches_of(rows) == [["a", "c"], ["b", "d"]]


def test_a_row_with_a_seed_is_alone():
    sampled = {"do_sample": True}
    rows = [("a", sampled, None), ("b", sampled, 1), ("c", sampled, 1), ("d", sampled, None)]
    assert batches_of(rows) == [["a", "d"], ["b"], ["c"]]


def test_captions_of_a_row_count():
    three = {"num_return_sequences": 3}
    assert batches_of([("a", three, None), ("b", three, None)]) == [["a"], ["b"]]
    assert batches_of([("a", {"num_return_sequences": 8}, None)]) == [["a"]]


def test_a_lone_row_waits_no_longer_than_it_may():
    start = time.perf_counter()
    batches_of([("a", {}, None)], max_wait=0.1)
    assert 0.1 <= time.perf_counter() - start < 2


def test_a_full_batch_does_not_wait():
    start = time.perf_counter()
    batches_of([("a", {}, None)] * 4, max_wait=30)
    assert time.perf_counter() - start < 10


def test_rows_stop_waiting_when_the_server_drains():
    async def run() -> list:
        captioner = Captioner()
        batcher = Batcher(captioner, 4, 60.0)
        task = asyncio.create_task(batcher.serve())
        row = Row(None, "a", {})
        batcher.submit(row)
        await asyncio.sleep(0.02)
        batcher.stop_waiting()
        await asyncio.wait_for(row.future, 20)
        task.cancel()
        return captioner.batches

    assert asyncio.run(run()) == [["a"]]


def test_rows_that_arrive_while_a_batch_runs_share_the_next_one():
    async def run() -> list:
        captioner = Captioner(0.1)
        batcher = Batcher(captioner, 8, 0.0)
        task = asyncio.create_task(batcher.serve())
        rows = [Row(None, str(number), {}) for number in range(4)]
        for row in rows:
            batcher.submit(row)
            await asyncio.sleep(0.01)
        await asyncio.gather(*(row.future for row in rows))
        task.cancel()
        return captioner.batches

    assert asyncio.run(run()) == [["0"], ["1", "2", "3"]]


def test_a_failure_reaches_every_row_and_the_queue_goes_on():
    async def run() -> list:
        calls = []

        async def caption(rows):
            calls.append(rows)
            if len(calls) == 1:
                raise RuntimeError("broken")
            return [CaptionedRequest(["fine"], [1], 0) for _ in rows]

        batcher = Batcher(caption, 2, 0.01)
        task = asyncio.create_task(batcher.serve())
        rows = [Row(None, "", {}) for _ in range(3)]
        for row in rows:
            batcher.submit(row)
        results = await asyncio.gather(*(row.future for row in rows))
        task.cancel()
        return [str(getattr(result, "captions", result)) for result in results]

    assert asyncio.run(run()) == ["broken", "broken", "['fine']"]


def test_a_discarded_row_is_not_captioned():
    async def run() -> list:
        captioner = Captioner()
        batcher = Batcher(captioner, 4, 0.05)
        task = asyncio.create_task(batcher.serve())
        rows = [Row(None, name, {}) for name in "abc"]
        for row in rows:
            batcher.submit(row)
        await asyncio.sleep(0)
        batcher.discard(rows[0])
        batcher.discard(rows[0])  # the second time has no effect
        await asyncio.gather(rows[1].future, rows[2].future)
        task.cancel()
        return captioner.batches

    assert asyncio.run(run()) == [["b", "c"]]


def test_pixels_wait_for_room_in_order():
    async def run() -> list[str]:
        budget, order = PixelBudget(10), []

        async def hold(name: str, pixels: int) -> None:
            async with budget.hold(pixels, "messages"):
                order.append(name)
                assert budget.used <= 10
                await asyncio.sleep(0.01)

        await asyncio.gather(hold("a", 6), hold("b", 8), hold("c", 1), hold("d", 10), hold("e", 2))
        return order

    assert asyncio.run(run()) == ["a", "b", "c", "d", "e"]


def read_videos(*frames: int) -> int:
    """Read videos of so many frames at once, with room for 4 frames, and return the pixels held after that."""

    async def run() -> int:
        image = tiny.picture(1)
        options = ServingOptions("tiny", max_image_pixels=image.width * image.height)
        with ThreadPoolExecutor(2) as threads:
            reader = ImageReader(options, threads, max_images=8)

            async def read(count: int) -> None:
                async with reader.open([picture_url()] * count, "messages", allows_base64=False) as images:
                    assert len(images) == count
                    assert 0 < reader.budget.used <= reader.budget.limit

            async with asyncio.timeout(20):
                await asyncio.gather(*map(read, frames))
        return reader.budget.used

    return asyncio.run(run())


def test_videos_that_do_not_fit_together_are_read_one_after_the_other():
    assert read_videos(3, 3, 4, 1) == 0


def test_a_video_larger_than_the_room_is_refused():
    with pytest.raises(ApiError, match="pixels together") as refused:
        read_videos(5)
    assert refused.value.status == 413


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        ({"max_tokens": 50}, {}),
        ({"max_tokens": 500}, {}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"top_p": 1.0}, {}),
        ({"temperature": 0.0}, {"do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.9}, dict(do_sample=True, num_beams=1, temperature=0.5, top_p=0.9)),
        ({"top_p": 0.9}, dict(do_sample=True, num_beams=1, temperature=1.0, top_p=0.9)),
        ({"n": 2}, dict(do_sample=True, num_beams=1, temperature=1.0, num_return_sequences=2)),
    ],
)
def test_options_of_requests(fields, options):
    request = CaptionRequest(sources=("",), prompt="", param="messages", **fields)
    assert generation_options(request, num_beams=None, max_new_tokens=None, limit=50) == options


def test_the_best_beams_are_several_captions():
    request = CaptionRequest(sources=("",), prompt="", param="messages", n=3)
    assert generation_options(request, 4, None, 50) == dict(num_beams=4, num_return_sequences=3)
    with pytest.raises(ApiError, match="temperature"):
        generation_options(CaptionRequest(sources=("",), prompt="", param="messages", n=3, temperature=0), 2, None, 50)


# --- Of the whole server ----------------------------------------------------------------------------------------------


def run_together(client, requests: list) -> list:
    """Send chat completions at the same time, each given by its arguments."""
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(lambda request: client.chat(*request[0], **request[1]), requests))


def batch_sizes(client) -> float:
    """Return the mean number of captions in a batch."""
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    name = "qformer_captioner_batch_size"
    return float(lines[f"{name}_sum"]) / float(lines[f"{name}_count"])


def test_answers_of_a_batch_are_those_of_single_requests(serve, captioner):
    client = serve(max_wait_ms=2000, max_batch_size=6)
    prompts = ["a", "", "a red circle above", "two", "", "a green"]
    together = run_together(client, [((picture_url(seed), text), {}) for seed, text in enumerate(prompts)])
    captions = [response.json()["choices"][0]["message"]["content"] for response in together]
    assert captions == [captioner.caption(tiny.picture(seed), text) for seed, text in enumerate(prompts)]
    assert batch_sizes(client) == 6


def test_a_row_that_fails_does_not_fail_its_batch(serve, captioner):
    client = serve(max_wait_ms=2000, max_batch_size=3)
    requests = [((picture_url(1),), {}), ((picture_url(2), "a red " * 40), {}), ((picture_url(3),), {})]
    first, second, third = run_together(client, requests)
    assert second.status_code == 400
    assert "Shorten the prompt" in second.json()["error"]["message"]
    captions = [response.json()["choices"][0]["message"]["content"] for response in (first, third)]
    assert captions == [captioner.caption(tiny.picture(seed)) for seed in (1, 3)]


def test_a_full_queue_refuses_requests(serve):
    client = serve(max_wait_ms=1000, max_batch_size=8, max_queue_size=2)
    responses = run_together(client, [((picture_url(seed),), {}) for seed in range(6)])
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 2 + [429] * 4
    refused = next(response for response in responses if response.status_code == 429)
    assert (refused.headers["retry-after"], refused.json()["error"]["code"]) == ("1", "queue_full")


def test_a_server_that_loads_or_drains_refuses_requests(serve):
    client = serve()
    for status in ("loading", "draining"):
        client.service.status = status
        response = client.chat()
        assert (response.status_code, response.json()["error"]["code"]) == (503, status)
        assert (client.get("/health").status_code, client.get("/live").status_code) == (503, 200)
    client.service.status = "ready"
    assert client.chat().status_code == 200
