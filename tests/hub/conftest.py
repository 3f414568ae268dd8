"""Backbones that the tests of conversion share."""

import pytest

from ..fixtures import tiny


@pytest.fixture
def backbones(tmp_path) -> tuple[str, str]:
    """Folders of a vision encoder and a language model."""
    return tiny.save_vision(tmp_path / "clip"), tiny.save_language(tmp_path / "llama")
