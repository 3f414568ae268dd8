"""Captions of a Q-Former in stage 1 by its own head. Each test states one property."""

import pytest
import torch
from torch.nn import functional
from transformers import GenerationConfig, TextStreamer

from qformer_captioner import QFormerForPretraining
from qformer_captioner.decoding_qformer import QFormerDecoder, align_right
from qformer_captioner.processing_qformer import QFormerPretrainingProcessor
from qformer_captioner.texts_qformer import check_texts

from ..fixtures import tiny
from ..fixtures.batches import captions_in

CLS, SEP, WORD = 2, 3, 6  # of `tiny.text_tokenizer`; words begin at 6
DEC = len(tiny.text_tokenizer())  # which the processor adds
ROWS = 3
# Random models repeat one token, so repetition is forbidden where captions of images must differ.
VARIED = dict(max_new_tokens=6, no_repeat_ngram_size=1)


def model_of(vision: str | None, **fields) -> QFormerForPretraining:
    """Return a model with a processor, whose captions depend on the image."""
    torch.manual_seed(0)
    processor = QFormerPretrainingProcessor(tiny.image_processor(), tiny.text_tokenizer())
    text = {"num_hidden_layers": 3, "num_query_tokens": 4, "vocab_size": len(processor.tokenizer)}
    model = tiny.pretraining_model(vision, text, bos_token_id=DEC, eos_token_id=SEP, **fields)
    model.processor = processor
    return model


@pytest.fixture(scope="module")
def model() -> QFormerForPretraining:
    """Return a model that reads features."""
    return model_of(vision=None, label_smoothing=0)


@pytest.fixture
def features() -> torch.Tensor:
    return 3 * torch.randn(ROWS, 6, tiny.VISION_WIDTH, generator=torch.Generator().manual_seed(1))


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """Return texts `[CLS] text [SEP]` with so many random tokens of text, padded with ordinary tokens."""
    torch.manual_seed(2)
    ids = torch.randint(WORD, DEC, (len(lengths), max(lengths) + 2))
    ids[:, 0] = CLS
    for row, length in zip(ids, lengths, strict=True):
        row[length + 1] = SEP
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None] + 2
    return {"input_ids": ids, "attention_mask": mask.long()}


def logits_after(model, features, tokens: list[int]) -> torch.Tensor:
    """Return the logits of the next token by the pass of training: a text of these tokens and one that is predicted."""
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output))
    text = torch.tensor([[CLS, *tokens, SEP]])
    model(image_embeds=features.repeat(2, 1, 1), input_ids=text.repeat(2, 1))
    handle.remove()
    return seen[0][len(tokens)].detach()


def test_logits_give_the_loss_of_training(model, features):
    texts = check_texts(**prompts(5, 2, 7), num_images=ROWS, config=model.qformer.config)
    decoder = QFormerDecoder(model.qformer, model.lm_head, model._encode_queries(features, None))
    inputs = texts.decoder_inputs(DEC)
    logits = decoder(inputs.ids, decoder.with_queries(inputs.mask.long())).logits
    loss = functional.cross_entropy(logits[inputs.mask], texts.decoder_targets())
    expected = model(image_embeds=features, input_ids=texts.ids, attention_mask=texts.mask.long()).itg_loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


def test_greedy_captions_are_the_most_likely_tokens_of_training(model, features):
    """Compute each token by a forward pass of its own, so that errors of the KV cache and of positions show."""
    for row in features.split(1):
        caption = model.generate(image_embeds=row, max_new_tokens=6, eos_token_id=None)[0].tolist()
        tokens: list[int] = []
        for _ in range(6):
            tokens.append(logits_after(model, row, tokens).argmax().item())
        assert caption == tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("lengths", [None, (3, 0, 5)], ids=["no prompts", "prompts"])
def test_cached_equals_uncached(model, features, attention, options, lengths):
    model.set_attn_implementation({"qformer_config": attention})
    inputs = {"image_embeds": features, **(prompts(*lengths) if lengths else {}), **VARIED, **options}
    cached = model.generate(**inputs, return_dict_in_generate=True, output_scores=True)
    uncached = model.generate(**inputs, return_dict_in_generate=True, output_scores=True, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.scores, uncached.scores, rtol=1e-5, atol=1e-5)
    assert len(cached.sequences.unique(dim=0)) == len(cached.sequences)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("lengths", [None, (3, 0, 5)], ids=["no prompts", "prompts"])
def test_a_batch_is_captioned_as_its_images_are_alone(model, features, beams, lengths):
    texts = prompts(*lengths) if lengths else {}
    together = captions_in(model.generate(image_embeds=features, **texts, **VARIED, num_beams=beams), end=SEP)
    for index in range(ROWS):
        row = slice(index, index + 1)
        alone = {name: tensor[row] for name, tensor in texts.items()}
        if lengths:  # without the padding
            alone = {name: tensor[:, : lengths[index] + 2] for name, tensor in alone.items()}
        caption = model.generate(image_embeds=features[row], **alone, **VARIED, num_beams=beams)
        assert captions_in(caption, end=SEP) == together[row]


def test_a_caption_continues_the_prompt(model, features):
    """The tokens after a prompt are those of the whole caption, if the prompt is the beginning of it."""
    whole = model.generate(image_embeds=features[:1], max_new_tokens=6, eos_token_id=None)[0]
    start = torch.tensor([[CLS, *whole[:3], SEP]])
    rest = model.generate(image_embeds=features[:1], input_ids=start, max_new_tokens=3, eos_token_id=None)
    assert rest.tolist() == [whole[3:].tolist()]


def test_padded_features_do_not_change_captions(model, features):
    expected = model.generate(image_embeds=features, **VARIED, num_beams=2)
    padding = torch.full((ROWS, 2, tiny.VISION_WIDTH), torch.nan)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * ROWS)
    padded = dict(image_embeds=torch.cat([padding, features], dim=1), image_attention_mask=mask)
    assert torch.equal(model.generate(**padded, **VARIED, num_beams=2), expected)


def test_rows_of_features_may_have_other_lengths(model, features):
    rows = [features[0], features[1, :4], features[2, :2]]
    captions = model.caption(image_embeds=rows, **VARIED)
    assert captions == [model.caption(image_embeds=row, **VARIED) for row in rows]
    assert len(set(captions)) == ROWS


def test_samples_of_an_image_differ_and_depend_on_the_seed(model, features):
    def sample() -> torch.Tensor:
        torch.manual_seed(5)
        return model.generate(image_embeds=features, max_new_tokens=5, do_sample=True, num_return_sequences=2)

    assert torch.equal(sample(), sample())
    assert sample().shape[0] == 2 * ROWS
    assert not torch.equal(sample()[0::2], sample()[1::2])


def test_a_caption_ends_at_its_end_of_sequence(model, features):
    """Declare the most likely first token to be the end-of-sequence token."""
    first = model.generate(image_embeds=features[:1], max_new_tokens=1).item()
    ended = model.generate(image_embeds=features[:1], max_new_tokens=6, eos_token_id=first)
    assert ended.tolist() == [[first]]


def test_a_repetition_penalty_leaves_the_prompt_out(model, features):
    """A token of the prompt keeps its score, and a token of the caption is not repeated."""
    texts = prompts(4)
    options = dict(image_embeds=features[:1], max_new_tokens=6, eos_token_id=None, repetition_penalty=1e6)
    output = model.generate(**texts, **options, return_dict_in_generate=True, output_scores=True, output_logits=True)
    torch.testing.assert_close(output.scores[0], output.logits[0])
    assert len(set(output.sequences[0].tolist())) == 6


def test_defaults_of_the_model_are_saved(model, features, tmp_path):
    expected = model.generate(image_embeds=features, num_beams=3, max_new_tokens=4)
    try:
        model.generation_config = GenerationConfig(num_beams=3, max_new_tokens=4)
        model.save_pretrained(tmp_path)
    finally:
        model.generation_config = GenerationConfig()
    assert torch.equal(QFormerForPretraining.from_pretrained(tmp_path).generate(image_embeds=features), expected)


def test_a_folder_without_decoding_defaults_opens(model, features, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    loaded = QFormerForPretraining.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(image_embeds=features), model.generate(image_embeds=features))


def test_a_caption_is_as_long_as_the_qformer_reads(model, features):
    limit = model.qformer.config.max_position_embeddings
    captions = model.generate(image_embeds=features, **prompts(3, 3, 3), eos_token_id=None)
    assert captions.shape[1] == limit - 3
    with pytest.raises(ValueError, match=rf"`max_new_tokens={limit - 3}`"):
        model.generate(image_embeds=features, **prompts(3, 3, 3), max_new_tokens=limit - 2)


def test_generate_changes_neither_weights_nor_modes(model, features):
    model.train()
    names = list(model.state_dict())
    model.generate(image_embeds=features, max_new_tokens=2)
    assert model.qformer.encoder.training and list(model.state_dict()) == names
    model.eval()


def test_padding_of_prompts_moves_to_the_left():
    texts = check_texts(**prompts(3, 1), num_images=2, config=tiny.pretraining_model(vision=None).qformer.config)
    ids, mask = align_right(texts.decoder_inputs(DEC))
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert ids[1, 2:].tolist() == [DEC, texts.ids[1, 1].item()]


@pytest.fixture(scope="module")
def reader() -> QFormerForPretraining:
    """Return a model with a vision encoder."""
    return model_of(vision="vit")


class TestCaption:
    """Tests of `caption`, from pictures to strings."""

    OPTIONS = dict(max_new_tokens=6, min_new_tokens=6)

    def test_a_list_gives_a_list_of_the_same_captions(self, reader):
        pictures = [tiny.picture(0), tiny.picture(1)]
        captions = reader.caption(pictures, **self.OPTIONS)
        assert captions == [reader.caption(picture, **self.OPTIONS) for picture in pictures]
        assert captions[0] != captions[1] and "[" not in captions[0]

    def test_one_prompt_serves_all_images_or_each_has_its_own(self, reader):
        pictures, texts = [tiny.picture(0), tiny.picture(1)], ["a red circle above", "two"]
        captions = reader.caption(pictures, prompt=texts, **self.OPTIONS)
        alone = [reader.caption(picture, text, **self.OPTIONS) for picture, text in zip(pictures, texts, strict=True)]
        assert captions == alone
        assert reader.caption(pictures, prompt="two", **self.OPTIONS)[1] == captions[1]
        assert reader.caption(pictures, **self.OPTIONS) != captions

    def test_an_empty_prompt_is_none(self, reader):
        pictures = [tiny.picture(0), tiny.picture(1)]
        assert reader.caption(pictures, ["", ""], **self.OPTIONS) == reader.caption(pictures, **self.OPTIONS)

    def test_tokens_are_streamed(self, reader, capsys):
        streamer = TextStreamer(reader.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        caption = reader.caption(tiny.picture(), streamer=streamer, **self.OPTIONS)
        assert capsys.readouterr().out.strip() == caption


def test_a_trained_model_writes_the_texts_of_its_images(features):
    model = model_of(vision=None, itc_weight=0.0, itm_weight=0.0, label_smoothing=0.0)
    batch = model.processor(image_embeds=features, text=tiny.CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.caption(image_embeds=features, num_beams=3) == tiny.CAPTIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"past_key_values": object()}, "`past_key_values`"),
        ({"cache_implementation": "static"}, "`cache_implementation`"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "`output_attentions`"),
        ({"prompt_lookup_num_tokens": 3}, "`prompt_lookup_num_tokens`"),
        ({"input_ids": torch.ones(ROWS, 2, 4).long()}, "one text for each image"),
        ({"input_ids": torch.full((ROWS, 4), CLS)}, r"\[CLS\] text \[SEP\]"),
        ({"input_ids": torch.full((ROWS, 1), SEP)}, r"\[CLS\] text \[SEP\]"),
        ({"input_ids": torch.tensor([[CLS, WORD, SEP]])}, "do not fit 3 images"),
        ({"not_an_option": 1}, "not_an_option"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(model, features, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(image_embeds=features, **arguments)


def test_captions_without_training_are_warned_of(features, caplog):
    model_of(vision=None, itg_weight=0.0).generate(image_embeds=features, max_new_tokens=2)
    assert "itg_weight=0" in caplog.text
