"""A tiny captioner behind a server in this process."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ..fixtures import tiny

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "openai")  # of the extras `serve` and `test`
collect_ignore_glob = [] if all(map(importlib.util.find_spec, NEEDED)) else ["test_*.py"]


@pytest.fixture(scope="session")
def captioner():
    """Return a captioner whose captions have at most 8 tokens."""
    model = tiny.captioner()
    model.generation_config.max_new_tokens = 8
    return model


@pytest.fixture
def serve(captioner) -> Iterator[Callable]:
    """Return a function that starts a server with the given options and returns a client of it."""
    from .requests import Client

    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Client(captioner, **options))


@pytest.fixture(scope="module")
def client(captioner):
    """Return a client of a server with the default options."""
    from .requests import Client

    with Client(captioner) as client:
        yield client
