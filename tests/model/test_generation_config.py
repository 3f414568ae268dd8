"""Decoding options of a call, of a configuration and of the captioner: which of them applies."""

import json

import pytest
import torch
from transformers import GenerationConfig

from qformer_captioner import QFormerCaptioner

from ..fixtures import tiny
from ..fixtures.batches import captions_in, single_row

LANGUAGES = ["llama", "bart", "t5"]


def first_token(model: QFormerCaptioner) -> int:
    """Return the first token of a caption without an end."""
    return model.generate(**single_row(tiny.batch(), 0), max_new_tokens=1).item()


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_given_configuration_keeps_the_captioners_options_that_it_does_not_set(language):
    model, batch = tiny.captioner(language=language), tiny.batch()
    model.generation_config.update(num_beams=3, repetition_penalty=5.0, eos_token_id=[1, first_token(model)])
    expected = model.generate(**batch, max_new_tokens=12)
    assert torch.equal(model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=12)), expected)


@pytest.mark.parametrize("field", ["max_new_tokens", "max_length"])
def test_a_given_configuration_overrides_the_captioners_options(either, field, monkeypatch):
    monkeypatch.setattr(either, "generation_config", GenerationConfig(num_beams=3, max_new_tokens=9, min_new_tokens=9))
    given = GenerationConfig(**{field: 4}, num_beams=1, min_new_tokens=4)
    written = either.generate(**tiny.batch(), generation_config=given)
    assert torch.equal(written, either.generate(**tiny.batch(), num_beams=1, max_new_tokens=4, min_new_tokens=4))
    assert written.shape == (3, 4)


def test_an_argument_overrides_a_given_configuration(either):
    given = GenerationConfig(max_new_tokens=9, min_new_tokens=3)
    assert either.generate(**tiny.batch(), generation_config=given, max_length=3).shape == (3, 3)


def test_a_configuration_that_sets_nothing_changes_nothing(either):
    expected = either.generate(**tiny.batch())
    assert torch.equal(either.generate(**tiny.batch(), generation_config=GenerationConfig()), expected)


@pytest.mark.parametrize("language", LANGUAGES)
def test_special_tokens_outlive_a_new_generation_config(language):
    model, batch = tiny.captioner(language=language), single_row(tiny.batch(), 0)
    model.config.eos_token_id = [1, first_token(model)]
    model.generation_config = GenerationConfig(max_new_tokens=6)
    assert model.generate(**batch).tolist() == [[model.config.eos_token_id[1]]]


@pytest.mark.parametrize("language", ["bart", "t5"])
def test_the_start_token_of_training_outlives_a_new_generation_config(language):
    model, batch = tiny.captioner(language=language), tiny.batch()
    expected = model(**batch).loss
    model.generation_config = GenerationConfig(max_new_tokens=6)
    assert torch.equal(model(**batch).loss, expected)


def test_without_any_length_a_caption_has_at_most_fifty_tokens():
    model = tiny.captioner("clip", "t5")
    model.generation_config = GenerationConfig()
    assert model.generate(**tiny.batch(), eos_token_id=None).shape == (3, 50)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_caption_without_end_token_does_not_end(language):
    model, batch = tiny.captioner(language=language), single_row(tiny.batch(), 0)
    model.language_model.generation_config.eos_token_id = first_token(model)
    model.config.eos_token_id = model.generation_config.eos_token_id = first_token(model)
    assert model.generate(**batch, max_new_tokens=6).shape == (1, 1)
    assert model.generate(**batch, max_new_tokens=6, eos_token_id=None).shape == (1, 6)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """Folder of a captioner whose language model names a second end-of-sequence token, as chat models do."""
    folder = tmp_path_factory.mktemp("chat")
    tiny.save_language(folder / "language")
    GenerationConfig(eos_token_id=[1, 7], pad_token_id=3, num_beams=4).save_pretrained(folder / "language")
    model = QFormerCaptioner.from_backbones(tiny.save_vision(folder / "vision"), folder / "language", **tiny.QFORMER)
    model.save_pretrained(folder / "captioner")
    return folder / "captioner"


def test_a_saved_folder_keeps_the_special_tokens_of_the_language_model(chat_folder):
    model = QFormerCaptioner.from_pretrained(chat_folder, generation_config=GenerationConfig(max_new_tokens=5))
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([1, 7], 3)
    assert model.generation_config.num_beams is None


def test_a_folder_with_special_tokens_in_its_decoding_defaults_alone_keeps_them(chat_folder):
    """Folders of earlier versions are so."""
    config = json.loads((chat_folder / "config.json").read_text())
    assert config.pop("eos_token_id") == [1, 7]
    config["pad_token_id"] = 0
    (chat_folder / "config.json").write_text(json.dumps(config))
    model = QFormerCaptioner.from_pretrained(chat_folder)
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([1, 7], 3)


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
def test_the_repetition_penalty_of_a_batch_is_that_of_its_images_alone(model):
    batch, options = tiny.batch(), dict(max_new_tokens=6, repetition_penalty=9.0)
    together = captions_in(model.generate(**batch, **options))
    assert together == [captions_in(model.generate(**single_row(batch, index), **options))[0] for index in range(3)]
    assert all(len(set(caption)) == len(caption) for caption in together)
