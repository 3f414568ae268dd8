"""Fixtures that several tests of the model use."""

import pytest

from ..fixtures import tiny


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A folder with a vision encoder and two language models."""
    folder = tmp_path_factory.mktemp("backbones")
    tiny.save_vision(folder / "vision")
    tiny.save_language(folder / "llama", max_position_embeddings=256)
    tiny.save_language(folder / "t5", "t5")
    return folder
