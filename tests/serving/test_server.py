"""The command in a process: OpenAI's client, a load with broken requests, clients that leave, and SIGTERM."""

import asyncio
import contextlib
import json
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest

from benchmarks.serving import (
    BROKEN,
    MAX_BODY_BYTES,
    Case,
    check_outcomes,
    make_cases,
    make_images,
    send,
    send_all,
    wait_until_ready,
)

from ..conftest import ROOT
from ..fixtures import tiny
from ..fixtures.markdown import code_blocks
from .requests import NAME, chat_body, picture_url

pytestmark = pytest.mark.slow  # starts processes


@dataclass
class Running:
    """A server in a process.

    Args:
        client: the process whose exit status is that of the server.
        server: the server.
        port: its port.
    """

    client: subprocess.Popen
    server: psutil.Process
    port: int

    def get(self, path: str) -> str:
        """Return the text at an address."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """Return a metric, or 0 if nothing was counted."""
        found = re.search(rf"^qformer_captioner_{re.escape(name)} (\S+)$", self.get("/metrics"), re.M)
        return float(found[1]) if found else 0.0


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def folder(captioner, tmp_path_factory) -> Path:
    """Return the folder of the captioner, whose name is that of the model."""
    folder = tmp_path_factory.mktemp("models") / NAME
    captioner.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def running(commands, folder: Path, *options: str) -> Iterator[Running]:
    """Run the command until the block ends."""
    before = {fork.pid for fork in psutil.Process(commands.process.pid).children()}
    command = [str(commands.bin / "qformer-captioner"), "serve", "--model", str(folder), "--port", "0", *options]
    client = subprocess.Popen(command, env=commands.environment(), stdout=subprocess.PIPE, text=True)
    port = int(re.search(r"http://127.0.0.1:(\d+)/v1", client.stdout.readline())[1])
    (fork,) = [fork for fork in psutil.Process(commands.process.pid).children() if fork.pid not in before]
    try:
        wait_until_ready("127.0.0.1", port, 60)
        yield Running(client, fork, port)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            fork.kill()
        client.wait()
        client.stdout.close()


@pytest.fixture(scope="module")
def server(commands, folder) -> Iterator[Running]:
    """Return a server that waits long enough for clients to leave."""
    options = ("--max_wait_ms", "300", "--max_body_bytes", str(MAX_BODY_BYTES), "--read_timeout", "1")
    with running(commands, folder, *options) as server:
        yield server


def test_the_client_of_openai(server, captioner):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
    caption = captioner.caption(tiny.picture(1))
    messages = chat_body()["messages"]
    create = client.chat.completions.create
    answer = create(model=NAME, messages=messages)
    assert answer.choices[0].message.content == caption
    assert answer.usage.completion_tokens > 0
    chunks = list(create(model=NAME, messages=messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == caption
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    parts = [{"type": "input_image", "image_url": picture_url(), "detail": "low"}]
    assert client.responses.create(model=NAME, input=[{"role": "user", "content": parts}]).output_text == caption
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.NotFoundError, match="There is no model"):
        create(model="gpt-4o", messages=messages)
    with pytest.raises(openai.BadRequestError, match="no image"):
        create(model=NAME, messages=[{"role": "user", "content": "Hello"}])
    with pytest.raises(openai.UnprocessableEntityError, match="cannot be read"):
        create(model=NAME, messages=chat_body("data:image/png;base64,AAAA")["messages"])


def test_the_block_of_the_page(server, captioner, tmp_path, monkeypatch, capsys):
    (block,) = [block for block in code_blocks((ROOT / "docs/serving.md").read_text()) if block.language == "python"]
    monkeypatch.chdir(tmp_path)
    tiny.picture(3).save("dog.jpg")
    exec(block.source.replace("localhost:8000", f"127.0.0.1:{server.port}").replace('"scenes"', repr(NAME)))
    assert capsys.readouterr().out == captioner.caption("dog.jpg") + "\n"


def test_a_load_with_broken_requests(server, captioner):
    images = make_images(5)
    captions = [captioner.caption(image) for image in images]
    outcomes, _ = asyncio.run(send_all(make_cases(images, NAME, 120), "127.0.0.1", server.port, 32))
    check_outcomes(outcomes)
    answered = [each for each in outcomes if each.kind == "caption"]
    assert [each.caption for each in answered] == [captions[each.image] for each in answered]
    assert {*Counter(each.kind for each in outcomes)} == {"caption", *BROKEN}
    assert server.metric("batch_size_sum") > 2 * server.metric("batch_size_count")


def test_the_row_of_a_client_that_leaves_is_not_captioned(server):
    left = 'requests_total{path="/v1/chat/completions",status="499"}'
    before = server.metric(left), server.metric("batch_size_sum")
    asyncio.run(send(Case("leaves", json.dumps(chat_body()).encode(), 0), "127.0.0.1", server.port))
    wait_until(lambda: server.metric(left) > before[0])
    time.sleep(0.5)  # longer than a row waits for others
    assert (server.metric(left), server.metric("batch_size_sum")) == (before[0] + 1, before[1])


def test_sigterm_answers_what_has_arrived_and_refuses_the_rest(commands, folder, captioner):
    body = json.dumps(chat_body()).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running(commands, folder, "--max_wait_ms", "60000", "--max_batch_size", "64") as server:
        start = time.monotonic()
        early = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
        for connection in early:
            connection.sendall(head + body)
        wait_until(lambda: server.metric("queue_length") == len(early))
        late = socket.create_connection(("127.0.0.1", server.port))
        late.sendall(head + body[:100])  # keeps the server from its end
        wait_until(lambda: server.metric("reading") == 1)
        server.server.send_signal(signal.SIGTERM)
        wait_until(lambda: '"draining"' in server.get("/live"))
        refused = asyncio.run(send(Case("caption", body, 0), "127.0.0.1", server.port))
        assert refused.status == 503
        late.sendall(body[100:])
        for connection in [*early, late]:
            text = b"".join(iter(lambda connection=connection: connection.recv(65536), b"")).decode()
            connection.close()
            assert text.startswith("HTTP/1.1 200")
            caption = json.loads(text.partition("\r\n\r\n")[2])["choices"][0]["message"]["content"]
            assert caption == captioner.caption(tiny.picture(1))
        assert server.client.wait(timeout=30) == 0
        assert time.monotonic() - start < 50  # rows no longer wait for others


def test_a_captioner_that_cannot_be_loaded_ends_the_command(commands, tmp_path):
    command = [str(commands.bin / "qformer-captioner"), "serve", "--port", "0", "--model", str(tmp_path)]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be loaded" in line
