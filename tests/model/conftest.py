"""Captioners and backbones that the tests of a module share. The tests read them and do not change them."""

import pytest

from ..fixtures import tiny

PAIRS = [
    ("clip", "t5"),
    ("vit", "flan-t5"),
    ("siglip", "bart"),
    ("dinov2", "llama"),
    ("clip", "gpt2"),
    ("siglip", "opt"),
    ("dinov2", "qwen2"),
    ("clip", "gemma"),
    ("vit", "bloom"),
]
ONE_OF_EACH_KIND = [("clip", "bart"), ("dinov2", "llama")]


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def model(request):
    """Captioner of each pair of a vision encoder and a language model."""
    return tiny.captioner(*request.param)


@pytest.fixture(scope="module", params=ONE_OF_EACH_KIND, ids="-".join)
def either(request):
    """Captioner with an encoder-decoder, and one with a decoder-only language model."""
    return tiny.captioner(*request.param)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Folder with a vision encoder and two language models."""
    folder = tmp_path_factory.mktemp("backbones")
    tiny.save_vision(folder / "vision")
    tiny.save_language(folder / "llama", max_position_embeddings=256)
    tiny.save_language(folder / "t5", "t5")
    return folder
