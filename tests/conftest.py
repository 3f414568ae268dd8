"""Set-up of the tests: an importable checkout if the package is not installed, and a temporary Hugging Face home."""

import importlib.util
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator

import pytest

from .fixtures.fork_server import ForkServer
from .fixtures.hub_server import Hub

ROOT = pathlib.Path(__file__).resolve().parent.parent

if importlib.util.find_spec("qformer_captioner") is None:
    spec = importlib.util.spec_from_file_location(
        "qformer_captioner", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["qformer_captioner"] = module
    spec.loader.exec_module(module)


def pytest_configure(config: pytest.Config) -> None:
    """Give each process its own Hugging Face home.

    Two processes would write the same modules, and a user's token must not be used.
    """
    home = tempfile.TemporaryDirectory(prefix="huggingface")
    config.add_cleanup(home.cleanup)
    os.environ["HF_HOME"] = home.name


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Record the messages that the package logs in a test, from level INFO: `log.messages`, `log.text`."""
    caplog.set_level(logging.INFO, logger="qformer_captioner")
    return caplog


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Return a folder `shared` next to the repository, with real tokenizers, photographs and weights."""
    for folder in ROOT.parents:
        if (folder / "shared").is_dir():
            return folder / "shared"
    pytest.skip("needs a folder `shared` beside the repository")


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """Return the Hub of `commands`. Each test uses repositories of its own."""
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def commands(hub) -> Iterator[ForkServer]:
    """Return a server of commands that do not need an interpreter of their own.

    Each has one thread, because sums in another number of threads round differently.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        environment = hub.environment(folder / "home")
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        with ForkServer(folder, environment) as server:
            yield server
