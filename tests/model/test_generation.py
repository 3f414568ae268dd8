"""Captions that `generate` and `caption` write. Each test states one property."""

import pathlib

import pytest
import torch
from transformers import GenerationConfig

from ..fixtures import tiny
from ..fixtures.batches import captions_in, single_row


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.filterwarnings("ignore:Passing `no_repeat_ngram_size` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_captioned_as_its_images_are_alone(model, side, beams):
    """Repetition is forbidden, because random models repeat one token."""
    batch = tiny.batch(side=side)
    options = dict(max_new_tokens=6, num_beams=beams, no_repeat_ngram_size=1)
    together = captions_in(model.generate(**batch, **options))
    assert together == [captions_in(model.generate(**single_row(batch, index), **options))[0] for index in range(3)]
    assert together[0] != together[1]


def test_greedy_captions_are_the_most_likely_tokens_of_forward(model):
    """Compute each token by a forward pass of its own, so that errors of the KV cache and of positions show."""
    for index in range(3):
        inputs = single_row(tiny.batch(), index)
        inputs.pop("labels")
        caption = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
        tokens = []
        for _ in range(5):
            labels = torch.tensor([[*tokens, 0]])
            logits = model(**inputs, labels=labels).logits[0, -1].clone()
            logits[1] = -torch.inf  # `min_new_tokens` forbids to end
            tokens.append(logits.argmax().item())
        assert caption[0].tolist() == tokens


def test_cached_equals_uncached(model):
    batch = tiny.batch()
    options = dict(max_new_tokens=6, num_beams=2)
    assert torch.equal(
        model.generate(**batch, **options, use_cache=True), model.generate(**batch, **options, use_cache=False)
    )


@pytest.mark.parametrize("how", ["max_length", "max_new_tokens", "config max_length", "config max_new_tokens"])
def test_lengths_count_the_tokens_of_the_caption(either, how):
    lengths = {how.split()[-1]: 4, how.split()[-1].replace("max", "min"): 4}
    if how.startswith("config"):
        lengths = {"generation_config": GenerationConfig(**lengths, eos_token_id=1, decoder_start_token_id=1)}
    assert either.generate(**tiny.batch(), **lengths).shape == (3, 4)


@pytest.mark.parametrize("of_model", [True, False], ids=["of the model", "of the call"])
def test_min_length_counts_the_tokens_of_the_caption(either, of_model, monkeypatch):
    options = dict(sequence_bias=[[[1], 100.0]], max_new_tokens=5)  # the end of the sequence is most likely
    config = GenerationConfig(min_length=3, eos_token_id=1, pad_token_id=0, decoder_start_token_id=1)
    if of_model:
        monkeypatch.setattr(either, "generation_config", config)
    captions = either.generate(**tiny.batch(), **options, **({} if of_model else {"generation_config": config}))
    assert captions.shape == (3, 4)


def test_a_caption_ends_at_its_end_of_sequence(either):
    """Declare the most likely first token to be the end-of-sequence token."""
    batch = single_row(tiny.batch(), 0)
    first = either.generate(**batch, max_new_tokens=1).item()
    assert either.generate(**batch, max_new_tokens=6, eos_token_id=first).tolist() == [[first]]


def test_generate_ignores_labels(either):
    batch = tiny.batch()
    without = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert torch.equal(either.generate(**batch, max_new_tokens=5), either.generate(**without, max_new_tokens=5))


def test_several_captions_of_an_image(either):
    batch = tiny.batch()
    beams = either.generate(**batch, max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert beams.shape[0] == 6 and beams.shape[1] <= 4
    assert captions_in(beams[::2]) == captions_in(either.generate(**batch, max_new_tokens=4, num_beams=3))
    assert not torch.equal(beams[0], beams[1])
    sampled = either.generate(**batch, max_new_tokens=4, do_sample=True, num_return_sequences=2)
    assert sampled.shape[0] == 6


@pytest.mark.parametrize("beams", [1, 2])
def test_a_returned_dict_holds_the_same_captions(either, beams):
    batch = tiny.batch()
    options = dict(max_new_tokens=4, num_beams=beams)
    output = either.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, either.generate(**batch, **options))
    assert output.scores[0].shape == (3 * beams, tiny.WORDS)
    assert len(output.scores) == output.sequences.shape[1]


def test_generate_changes_no_settings(either):
    before = either.generation_config.to_dict()
    either.generate(**tiny.batch(), max_new_tokens=3, num_beams=2)
    config = GenerationConfig(max_new_tokens=3)
    either.generate(**tiny.batch(), generation_config=config, num_beams=2)
    assert either.generation_config.to_dict() == before
    assert config.num_beams is None


def test_generate_records_no_graph(either):
    output = either.generate(**tiny.batch(), max_new_tokens=2, return_dict_in_generate=True, output_logits=True)
    assert not output.logits[0].requires_grad


class TestCaption:
    """Tests of `caption`, from pictures to strings."""

    OPTIONS = dict(max_new_tokens=6, min_new_tokens=6)

    def test_a_picture_gives_a_string(self, either):
        caption = either.caption(tiny.picture(), **self.OPTIONS)
        assert isinstance(caption, str) and caption and caption == caption.strip()
        assert "<" not in caption  # no special tokens

    def test_the_caption_is_that_of_processor_and_generate(self, either):
        inputs = either.processor(images=tiny.picture(), text="a blue star")
        ids = either.generate(**inputs, **self.OPTIONS)
        text = either.processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert either.caption(tiny.picture(), prompt="a blue star", **self.OPTIONS) == text.strip()

    @pytest.mark.parametrize("kind", [str, pathlib.Path])
    def test_a_path_gives_the_caption_of_its_picture(self, either, kind, tmp_path):
        tiny.picture().save(tmp_path / "noise.png")
        caption = either.caption(kind(tmp_path / "noise.png"), **self.OPTIONS)
        assert caption == either.caption(tiny.picture(), **self.OPTIONS)

    def test_a_list_gives_a_list_of_the_same_captions(self, either):
        pictures = [tiny.picture(0), tiny.picture(1)]
        captions = either.caption(pictures, **self.OPTIONS)
        assert captions == [either.caption(picture, **self.OPTIONS) for picture in pictures]
        assert captions[0] != captions[1]
        assert either.caption(pictures[:1], **self.OPTIONS) == captions[:1]

    def test_one_prompt_serves_all_images_or_each_has_its_own(self, either):
        pictures, prompts = [tiny.picture(0), tiny.picture(1)], ["a red circle above", "two"]
        captions = either.caption(pictures, prompt=prompts, **self.OPTIONS)
        assert captions == [
            either.caption(picture, prompt=prompt, **self.OPTIONS)
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        assert either.caption(pictures, prompt="two", **self.OPTIONS)[1] == captions[1]
        assert either.caption(pictures, **self.OPTIONS) != captions

    def test_several_captions_of_one_picture_are_a_list(self, either):
        captions = either.caption(tiny.picture(), num_beams=3, num_return_sequences=3, **self.OPTIONS)
        assert len(captions) == len(set(captions)) == 3

    def test_an_empty_list_gives_an_empty_list(self, either):
        assert either.caption([]) == []

    def test_a_missing_file_is_named(self, either, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"absent\.png"):
            either.caption(tmp_path / "absent.png")

    def test_a_damaged_file_is_named(self, either, tmp_path):
        tiny.picture().save(tmp_path / "cut.png")
        whole = (tmp_path / "cut.png").read_bytes()
        (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(OSError, match=r"cut\.png"):
            either.caption([tiny.picture(), tmp_path / "cut.png"])

    def test_a_missing_processor_is_an_error_with_a_remedy(self):
        model = tiny.captioner()
        model.processor = None
        with pytest.raises(ValueError, match=r"model\.processor = "):
            model.caption(tiny.picture())


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}], ids=["greedy", "sampled"])
def test_captions_are_written_on_the_captioners_device(model, options):
    batch = tiny.batch()
    with torch.device("meta"):
        captions = model.generate(**batch, max_new_tokens=5, **options)
    assert captions.device == model.device
