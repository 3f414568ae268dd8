"""Makes the checkout importable as `qformer_captioner` when it is not installed; a Hugging Face home for the tests."""

import importlib.util
import logging
import os
import pathlib
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

if importlib.util.find_spec("qformer_captioner") is None:
    spec = importlib.util.spec_from_file_location(
        "qformer_captioner", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["qformer_captioner"] = module
    spec.loader.exec_module(module)


def pytest_configure(config: pytest.Config) -> None:
    """A home of its own for each process: two would write the same modules, and nobody's token belongs here."""
    home = tempfile.TemporaryDirectory(prefix="huggingface")
    config.add_cleanup(home.cleanup)
    os.environ["HF_HOME"] = home.name


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Messages that the package logs in a test, from INFO as commands show them: `log.messages`, `log.text`."""
    caplog.set_level(logging.INFO, logger="qformer_captioner")
    return caplog


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """A folder `shared` beside the repository, with real tokenizers, photographs and weights."""
    for folder in ROOT.parents:
        if (folder / "shared").is_dir():
            return folder / "shared"
    pytest.skip("needs a folder `shared` beside the repository")
