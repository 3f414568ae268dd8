"""Options of transformers' `generate`: each gives the right captions, or is refused in one sentence."""

import functools

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    StoppingCriteriaList,
    TextIteratorStreamer,
    WatermarkDetector,
    WatermarkingConfig,
)

from ..fixtures import tiny
from ..fixtures.batches import single_row

LANGUAGES = ["llama", "bart", "t5"]
LENGTH = dict(max_new_tokens=6, min_new_tokens=6)


@pytest.fixture(scope="module", params=LANGUAGES)
def model(request):
    return tiny.captioner("clip", request.param)


def decoding_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """Decode greedily, as a `custom_generate` of a user does: the first pass reads all inputs."""
    length = None
    while True:
        given = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=length, is_first_iteration=length is None, **inputs
        )
        output, length = model(**given, return_dict=True), 1
        is_encoder_decoder = model.config.is_encoder_decoder
        inputs = model._update_model_kwargs_for_generation(output, inputs, is_encoder_decoder=is_encoder_decoder)
        scores = logits_processor(input_ids, output.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores.argmax(-1, keepdim=True)], dim=1)
        if stopping_criteria(input_ids, None).all():
            return input_ids


OPTIONS_WITHOUT_EFFECT = {
    "a static cache": dict(cache_implementation="static"),
    "a dynamic cache": dict(cache_implementation="dynamic"),
    "no cache": dict(use_cache=False),
    "compilation": dict(compile_config=CompileConfig(fullgraph=False)),
    "no compilation": dict(disable_compile=True),
    "normalised logits": dict(renormalize_logits=True),
    "a tokenizer": dict(tokenizer=tiny.tokenizer()),
    "the most likely sample": dict(do_sample=True, top_k=1),
    "a guidance scale of one": dict(guidance_scale=1.0),
    "a loop": dict(custom_generate=decoding_loop),
}


@pytest.mark.parametrize("options", OPTIONS_WITHOUT_EFFECT.values(), ids=OPTIONS_WITHOUT_EFFECT)
def test_options_that_do_not_change_greedy_captions(model, options):
    expected = model.generate(**tiny.batch(), **LENGTH)
    assert torch.equal(model.generate(**tiny.batch(), **LENGTH, **options), expected)


def test_an_empty_cache_of_the_caller_is_filled(model):
    is_encoder_decoder = model.config.is_encoder_decoder
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if is_encoder_decoder else DynamicCache()
    expected = model.generate(**tiny.batch(), **LENGTH)
    assert torch.equal(model.generate(**tiny.batch(), **LENGTH, past_key_values=cache), expected)
    assert cache.get_seq_length() > 5
    with pytest.raises(ValueError, match=f"`past_key_values` already holds {cache.get_seq_length()} positions"):
        model.generate(**tiny.batch(), **LENGTH, past_key_values=cache)


def test_generate_py_of_a_folder_gets_no_filled_cache(model, tmp_path):
    (tmp_path / "custom_generate").mkdir()
    source = "def generate(model, **inputs):\n    assert inputs.get('past_key_values') is None\n"
    (tmp_path / "custom_generate" / "generate.py").write_text(source + "    return model.generate(**inputs)\n")
    (tmp_path / "config.json").write_text("{}")
    written = model.generate(**tiny.batch(), **LENGTH, custom_generate=str(tmp_path), trust_remote_code=True)
    assert torch.equal(written, model.generate(**tiny.batch(), **LENGTH))


# --- Options that change captions -------------------------------------------------------------------------------------


def test_callbacks_get_the_tokens_of_the_caption(model):
    """After the start token of an encoder-decoder."""
    start = int(model.config.is_encoder_decoder)
    lengths = []

    def count(token_ids, scores):
        lengths.append(token_ids.shape[1] - start)
        return scores

    def is_third(token_ids, scores, **kwargs):
        return torch.full((len(token_ids),), token_ids.shape[1] - start == 3)

    options = dict(logits_processor=[count], stopping_criteria=StoppingCriteriaList([is_third]))
    allowed = functools.partial(lambda batch_id, token_ids: [10 + len(token_ids) - start])
    written = model.generate(**tiny.batch(), max_new_tokens=6, prefix_allowed_tokens_fn=allowed, **options)
    assert written.tolist() == [[10, 11, 12]] * 3
    assert lengths == [0, 1, 2]


def test_a_streamer_gets_the_text_of_the_caption(model):
    streamer = TextIteratorStreamer(model.processor.tokenizer, skip_special_tokens=True)
    caption = model.caption(tiny.picture(), streamer=streamer, **LENGTH)
    assert "".join(streamer).strip() == caption


def test_a_caption_ends_after_a_stop_string(model):
    whole = model.caption(tiny.picture(), **LENGTH)
    stop = model.processor.decode(model.generate(**model.processor(tiny.picture()), max_new_tokens=1)[0]).strip()
    assert model.caption(tiny.picture(), stop_strings=[stop], max_new_tokens=6) == stop
    assert whole.startswith(stop) and whole != stop


def test_forced_and_suppressed_tokens_are_those_of_the_caption(model):
    plain, batch = model.generate(**tiny.batch(), **LENGTH), tiny.batch()
    assert model.generate(**batch, max_new_tokens=4, forced_eos_token_id=9)[:, -1].tolist() == [9] * 3
    suppressed = model.generate(**batch, max_new_tokens=4, begin_suppress_tokens=plain[:, 0].unique().tolist())
    assert not set(suppressed[:, 0].tolist()) & set(plain[:, 0].tolist())
    if model.config.is_encoder_decoder:
        assert model.generate(**batch, max_new_tokens=4, forced_bos_token_id=9)[:, 0].tolist() == [9] * 3


def test_no_time_is_one_token(model):
    assert model.generate(**tiny.batch(), **LENGTH, max_time=0.0).shape == (3, 1)


def test_a_watermark_is_found_in_captions():
    model = tiny.captioner()
    watermark = WatermarkingConfig(greenlist_ratio=0.3, bias=100.0)
    detector = WatermarkDetector(model.language_model.config, "cpu", watermark, ignore_repeated_ngrams=True)
    options = dict(max_new_tokens=30, min_new_tokens=30)
    plain = model.generate(**tiny.batch(), **options)
    marked = model.generate(**tiny.batch(), **options, watermarking_config=watermark)
    assert (detector(marked, return_dict=True).green_fraction == 1.0).all()
    assert (detector(plain, return_dict=True).green_fraction < 0.9).all()


@pytest.mark.parametrize("language", ["bart", "t5"])
def test_decoder_input_ids_begin_the_caption(language):
    model = tiny.captioner("clip", language)
    whole = model.generate(**tiny.batch(), **LENGTH)
    continued = model.generate(
        **tiny.batch(), max_new_tokens=4, min_new_tokens=4, decoder_input_ids=whole[:, :2].clone()
    )
    assert torch.equal(continued, whole)


def test_transition_scores_are_the_losses_of_the_caption(model):
    batch = single_row(tiny.batch(), 0)
    batch.pop("labels")
    options = dict(num_beams=3, return_dict_in_generate=True, output_logits=True, output_scores=True)
    output = model.generate(**batch, max_new_tokens=5, **options)
    scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
    losses = model(**batch, labels=output.sequences).losses
    torch.testing.assert_close(-scores.sum(dim=1), losses, rtol=1e-4, atol=1e-4)


# --- Options that are refused -----------------------------------------------------------------------------------------

REFUSED = {
    "inputs": torch.zeros(3, 2),
    "inputs_embeds": torch.zeros(3, 2, tiny.TEXT_WIDTH),
    "encoder_outputs": (torch.zeros(3, 2, tiny.TEXT_WIDTH),),
    "position_ids": torch.zeros(3, 2),
    "assistant_model": torch.nn.Identity(),
    "assistant_early_exit": 1,
    "prompt_lookup_num_tokens": 1,
    "use_mtp": True,
    "guidance_scale": 1.5,
    "negative_prompt_ids": torch.zeros(3, 2),
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "token_healing": True,
    "prefill_chunk_size": 1,
    "cache_implementation": "paged",
    "num_beans": 3,
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_cannot_work_is_refused_in_one_sentence(either, name):
    with pytest.raises(ValueError, match=name) as refused:
        either.generate(**tiny.batch(), **{name: REFUSED[name]})
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_streamer_with_beams_is_refused(either, do_sample):
    """A streamer that gets no tokens would never end."""
    with pytest.raises(ValueError, match="num_beams=1"):
        either.generate(**tiny.batch(), streamer=TextIteratorStreamer(None), num_beams=2, do_sample=do_sample)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloading_from_a_gpu_that_does_not_exist_is_refused(either, kind):
    with pytest.raises(ValueError, match=f"{kind}.*GPU"):
        either.generate(**tiny.batch(), cache_implementation=kind)


def test_a_cache_without_room_for_the_encoder_is_refused():
    with pytest.raises(ValueError, match="must be an `EncoderDecoderCache"):
        tiny.captioner("clip", "t5").generate(**tiny.batch(), past_key_values=DynamicCache())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_caption_refuses_to_return_an_object(either, options):
    config = GenerationConfig(return_dict_in_generate=True, **options)
    for given in ({"generation_config": config}, {"return_dict_in_generate": True, **options}):
        with pytest.raises(ValueError, match=r"call `model.generate\("):
            either.caption(tiny.picture(), **given)


def test_caption_returns_strings_where_the_captioner_returns_objects(either, monkeypatch):
    expected = either.caption(tiny.picture(), **LENGTH)
    monkeypatch.setattr(either, "generation_config", GenerationConfig(return_dict_in_generate=True, output_scores=True))
    assert either.caption(tiny.picture(), **LENGTH) == expected
