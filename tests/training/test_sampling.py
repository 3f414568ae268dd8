"""Samples of captions: they follow the model's distribution, do not depend on the batch, and share what they can."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from qformer_captioner import QFormerCaptioner
from qformer_captioner.language_qformer import decoder_of
from qformer_captioner.training.sampling import draw_uniforms, pick_tokens, sample_captions

from ..fixtures import tiny

LENGTH = 9


def captioner(language: str = "llama") -> QFormerCaptioner:
    """Return a captioner whose captions have different lengths, because many tokens end them."""
    model = tiny.captioner(language=language)
    model.generation_config.eos_token_id = [1, *range(2, 12)]
    return model


def batch() -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tiny.batch().items() if name != "labels"}


class Pick(LogitsProcessor):
    """Leave only the token that the numbers pick, in transformers' own loop."""

    def __init__(self, uniforms: torch.Tensor):
        self.uniforms, self.step = uniforms.flatten(0, 1), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = pick_tokens(scores, self.uniforms[:, self.step], 1.0)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@pytest.mark.parametrize("language", ["llama", "gpt2", "t5", "bart", "bloom"])
def test_samples_are_those_of_generate_with_the_same_numbers(language):
    model, uniforms = captioner(language), draw_uniforms(0, 3, range(3), 4, LENGTH)
    labels = sample_captions(model, batch(), uniforms)
    options = {"do_sample": True, "num_return_sequences": 4, "top_k": 0, "max_new_tokens": LENGTH}
    ids = model.generate(**batch(), **options, logits_processor=LogitsProcessorList([Pick(uniforms)])).view_as(labels)
    lengths = (labels != -100).sum(dim=2)
    assert lengths.unique().numel() > 2, "the samples have one length"
    for sample, written, length in zip(labels.flatten(0, 1), ids.flatten(0, 1), lengths.flatten(), strict=True):
        assert torch.equal(sample[:length], written[:length])
        assert sample[length - 1] in model.generation_config.eos_token_id or length == LENGTH
        assert (sample[length:] == -100).all()


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_row_without_numbers_is_the_greedy_caption(language):
    model, uniforms = captioner(language), draw_uniforms(0, 0, range(3), 2, LENGTH)
    uniforms[:, 1] = torch.nan
    labels = sample_captions(model, batch(), uniforms)[:, 1]
    greedy = model.generate(**batch(), num_beams=1, do_sample=False, max_new_tokens=LENGTH)
    is_token = labels[:, : greedy.shape[1]] != -100
    assert torch.equal(labels[labels != -100], greedy[is_token])


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_sample_does_not_depend_on_the_other_images(language):
    model, uniforms = captioner(language), draw_uniforms(0, 0, range(3), 2, LENGTH)
    together = sample_captions(model, batch(), uniforms)
    for image in range(3):
        inputs = {name: tensor[image : image + 1] for name, tensor in batch().items()}
        alone = sample_captions(model, inputs, uniforms[image : image + 1])[0]
        assert torch.equal(alone[alone != -100], together[image][together[image] != -100])


def test_the_numbers_depend_only_on_seed_step_and_place():
    whole = draw_uniforms(5, 7, range(6), 3, 4)
    assert torch.equal(whole[4:], draw_uniforms(5, 7, [4, 5], 3, 4))
    others = [draw_uniforms(6, 7, [4], 3, 4), draw_uniforms(5, 8, [4], 3, 4), draw_uniforms(5, 7, [3], 3, 4)]
    assert not any(torch.equal(whole[4:5], other) for other in others)


def test_tokens_are_picked_as_often_as_they_are_probable():
    logits = torch.tensor([0.0, 1.0, -torch.inf, 3.0, 2.0, -torch.inf])
    uniforms = (torch.arange(10000) + 0.5) / 10000
    for temperature in (1.0, 0.5):
        tokens = pick_tokens(logits.expand(10000, 6), uniforms, temperature)
        frequencies = tokens.bincount(minlength=6) / 10000
        torch.testing.assert_close(frequencies, (logits / temperature).softmax(0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_a_token_of_probability_0_is_never_picked(uniform):
    logits = torch.randn(100, 300, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = logits[:, -20:] = -torch.inf
    tokens = pick_tokens(logits, torch.full((100,), uniform), 1.0)
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_decoding_defaults_of_the_captioner_do_not_change_the_samples():
    uniforms = draw_uniforms(0, 0, range(3), 4, LENGTH)
    expected = sample_captions(captioner(), batch(), uniforms)
    model = captioner()
    model.generation_config.update(top_k=1, repetition_penalty=9.0, min_new_tokens=LENGTH, num_beams=3)
    assert torch.equal(sample_captions(model, batch(), uniforms), expected)


def test_an_image_is_encoded_once_and_captions_that_ended_leave_the_batch():
    model, shapes = captioner(), []
    encoded = []
    model.qformer.register_forward_hook(lambda *_: encoded.append(1))
    decoder_of(model.language_model).register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.last_hidden_state.shape[:2]))
    )
    labels = sample_captions(model, batch(), draw_uniforms(0, 3, range(3), 4, LENGTH))
    running = (labels != -100).flatten(0, 1).sum(dim=0).tolist()  # samples that have a token at each step
    assert encoded == [1]
    assert shapes[0][0] == 3, "the prefix of each image is read once"
    assert shapes[1:] == [(number, 1) for number in running]
    assert running[-1] < running[0]
