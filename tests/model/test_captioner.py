"""Losses and logits of a captioner. Each test states one property."""

import pytest
import torch
from transformers import AutoConfig

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig

from ..fixtures import tiny
from ..fixtures.batches import NEAR, labels_of_several_captions, single_row


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_scores_as_its_images_do_alone(model, side):
    """Prompts have 4, 0 and 2 tokens, padded on either side; captions have unequal lengths."""
    batch = tiny.batch(side=side)
    together = model(**batch).logits
    for index in range(3):
        alone = model(**single_row(batch, index)).logits[0]
        torch.testing.assert_close(together[index, : len(alone)], alone, **NEAR)


def test_loss_is_the_language_models_own(model):
    """Join `[queries, prompt, caption]` of one image by hand."""
    batch = single_row(tiny.batch(), 0)
    language, labels = model.language_model, batch["labels"]
    words = language.get_input_embeddings()
    prefix = torch.cat([model.get_soft_prompt(batch["pixel_values"]), words(batch["input_ids"])], dim=1)
    if model.config.is_encoder_decoder:
        reference = language(inputs_embeds=prefix, labels=labels).loss
    else:
        ignored = torch.full(prefix.shape[:2], -100)
        reference = language(
            inputs_embeds=torch.cat([prefix, words(labels)], dim=1), labels=torch.cat([ignored, labels], dim=1)
        ).loss
    torch.testing.assert_close(model(**batch).loss, reference, **NEAR)


@pytest.mark.parametrize("kind", ["pegasus", "marian", "bart"])
def test_the_encoder_scales_the_embeddings_of_a_prompt_as_its_own(kind):
    fields = tiny.BART | dict(model_type=kind, scale_embedding=True, decoder_start_token_id=2)
    text = AutoConfig.for_model(**fields, vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"), text_config=text, qformer_config=tiny.QFORMER
    )
    model, words = QFormerCaptioner(config).eval(), tiny.batch()["input_ids"][:1]
    prefix, _ = model.get_prefix(torch.zeros(1, tiny.QUERIES, tiny.TEXT_WIDTH), words)
    encoder = model.language_model.get_encoder()
    torch.testing.assert_close(
        encoder(inputs_embeds=prefix[:, tiny.QUERIES :]).last_hidden_state, encoder(input_ids=words).last_hidden_state
    )


@pytest.mark.parametrize("kind", ["m2m_100", "nllb-moe", "blenderbot", "blenderbot-small"])
def test_loss_is_that_of_encoder_decoders_that_shift_labels_in_forward(kind):
    fields = tiny.BART | dict(model_type=kind, decoder_start_token_id=2, forced_eos_token_id=None)
    if kind == "nllb-moe":
        fields |= dict(encoder_sparse_step=0, decoder_sparse_step=0)
    text = AutoConfig.for_model(**fields, vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"), text_config=text, qformer_config=tiny.QFORMER
    )
    model = QFormerCaptioner(config).eval()
    test_loss_is_the_language_models_own(model)
    assert model.generate(**tiny.batch(), max_new_tokens=3).shape == (3, 3)


def test_logits_are_those_of_the_labels_and_nothing_else(model):
    batch = tiny.batch()
    assert model(**batch).logits.shape == (3, 5, tiny.WORDS)
    assert model(**{**batch, "labels": labels_of_several_captions()}).logits.shape == (3, 4, 5, tiny.WORDS)
    assert model(**{**batch, "labels": None}).logits.shape == (3, 1, tiny.WORDS)
    assert model(**{**batch, "labels": None}).loss is None


def test_the_last_label_is_predicted_not_read(model):
    batch = single_row(tiny.batch(), 0)
    other = {**batch, "labels": batch["labels"].clone()}
    other["labels"][0, -1] = 50
    assert torch.equal(model(**other).logits, model(**batch).logits)
    other["labels"][0, -2] = 50
    assert not torch.allclose(model(**other).logits[0, -1], model(**batch).logits[0, -1], atol=1e-2)


def test_several_captions_score_as_one_by_one(model):
    batch = tiny.batch()
    labels = labels_of_several_captions()
    together = model(**{**batch, "labels": labels})
    apart = [model(**{**batch, "labels": labels[:, k]}) for k in range(4)]
    is_label = (labels != -100)[..., None]
    logits = torch.stack([output.logits for output in apart], dim=1)
    torch.testing.assert_close(together.logits * is_label, logits * is_label, **NEAR)
    tokens = (labels != -100).sum(dim=(0, 2))
    loss = sum(output.loss * number for output, number in zip(apart, tokens, strict=True)) / tokens.sum()
    torch.testing.assert_close(together.loss, loss, **NEAR)


def test_several_captions_encode_the_image_once(either):
    runs = []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: runs.append(len(output.last_hidden_state)))
        for part in (either.vision_model, either.qformer)
    ]
    either(**{**tiny.batch(), "labels": labels_of_several_captions()})
    for hook in hooks:
        hook.remove()
    assert runs == [3, 3]


def test_missing_captions_change_neither_loss_nor_gradients(either):
    batch = tiny.batch()
    missing = torch.full_like(batch["labels"], -100)
    three = torch.stack([missing, batch["labels"], missing], dim=1)
    queries = either.qformer.query_tokens

    loss = either(**batch).loss
    padded = either(**{**batch, "labels": three}).loss
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(torch.autograd.grad(padded, queries), torch.autograd.grad(loss, queries), **NEAR)


def test_no_caption_at_all_is_a_loss_of_zero(either):
    batch = tiny.batch()
    assert either(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss == 0


@pytest.mark.parametrize("labels", [tiny.batch()["labels"], labels_of_several_captions()], ids=["one", "several"])
def test_loss_is_the_mean_over_caption_tokens(either, labels):
    output = either(**{**tiny.batch(), "labels": labels})
    log_probabilities = output.logits.double().log_softmax(dim=-1)
    total, count = 0.0, 0
    for position in (labels != -100).nonzero().tolist():
        total -= log_probabilities[(*position, labels[tuple(position)])].item()
        count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_num_items_in_batch_divides_the_loss(either):
    batch = tiny.batch()
    count = (batch["labels"] != -100).sum()
    whole = either(**batch, num_items_in_batch=torch.tensor(40)).loss
    torch.testing.assert_close(whole, either(**batch).loss * count / 40)


def test_forward_accepts_use_cache_and_return_dict(model):
    batch = tiny.batch()
    output = model(**batch)
    assert torch.equal(model(**batch, use_cache=False).loss, output.loss)
    values = model(**batch, use_cache=True, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == len(output)
    assert all(torch.equal(part, expected) for part, expected in zip(values, output.to_tuple(), strict=True))


@pytest.mark.parametrize("prompt", [None, torch.zeros(3, 0, dtype=torch.long)], ids=["none", "empty"])
def test_no_prompt_equals_a_prompt_of_padding(model, prompt):
    batch = tiny.batch()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    without = {**batch, "input_ids": prompt, "attention_mask": None}
    torch.testing.assert_close(model(**without).loss, model(**batch).loss, **NEAR)


def test_image_and_prompt_change_the_logits(either):
    """The image, the prompt and the order of its tokens change the logits."""
    batch = single_row(tiny.batch(), 0)
    logits = either(**batch).logits
    for change in (
        dict(pixel_values=batch["pixel_values"].flip(-1)),
        dict(input_ids=batch["input_ids"][:, 1:]),
        dict(input_ids=batch["input_ids"].flip(1)),
    ):
        assert not torch.allclose(either(**{**batch, **change}).logits, logits, atol=1e-2), change.keys()


def test_image_features_give_the_same_as_their_image(model):
    batch = tiny.batch()
    features = model.encode_images(batch["pixel_values"]).last_hidden_state
    assert features.shape[0] == 3 and features.shape[2] == tiny.VISION_WIDTH
    instead = {**batch, "pixel_values": None, "image_embeds": features}
    assert torch.equal(model(**instead).logits, model(**batch).logits)
    assert torch.equal(model.generate(**instead, max_new_tokens=5), model.generate(**batch, max_new_tokens=5))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_both_or_neither_of_image_and_features_are_refused(either, call):
    pixels = tiny.images()
    for inputs in ({}, dict(pixel_values=pixels, image_embeds=either.encode_images(pixels).last_hidden_state)):
        with pytest.raises(ValueError, match="pixel_values.*image_embeds"):
            getattr(either, call)(**inputs)


def test_features_of_another_width_are_refused(either):
    with pytest.raises(ValueError, match=rf"\b17\b.*\b{tiny.VISION_WIDTH}\b"):
        either(image_embeds=torch.zeros(1, 5, 17))


@pytest.mark.parametrize("language", ["llama", "gpt2", "opt", "bart"])
def test_the_longest_prefix_is_accepted_and_a_longer_one_is_an_error(language):
    """The limit is 64 positions. Those of a decoder-only model include the caption."""
    model = tiny.captioner("clip", language)
    caption = 0 if language == "bart" else 5
    fits = 64 - tiny.QUERIES - caption
    batch = tiny.batch(prompts=[fits], captions=[5])
    assert model(**batch).loss.isfinite()
    assert model.generate(**batch, max_new_tokens=5, min_new_tokens=5).shape == (1, 5)
    longer = tiny.batch(prompts=[fits + 1], captions=[5])
    for too_long in (lambda: model(**longer), lambda: model.generate(**longer, max_new_tokens=5)):
        with pytest.raises(ValueError, match=rf"at most 64 .* {tiny.QUERIES} queries, a prompt of {fits + 1} .* 5 "):
            too_long()


@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_loss_is_computed_on_the_captioners_device(model, skip_logits):
    """A tensor created without a device would be on the CPU, even for a captioner on a GPU.

    The test uses the meta device.
    """
    batch = tiny.batch() | {"labels": labels_of_several_captions()}
    with torch.device("meta"):
        outputs = model(**batch, skip_logits=skip_logits)
        (gradient,) = torch.autograd.grad(outputs.loss, model.qformer.query_tokens)
    tensors = [gradient, *(value for value in outputs.values() if value is not None)]
    assert {tensor.device for tensor in tensors} == {model.device}
