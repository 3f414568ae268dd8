"""Losses of stage 1 against a plain transcription of the mathematics, with a pass for each use of the layers."""

import itertools

import pytest
import torch
from torch.nn import functional

from qformer_captioner import pretraining_qformer
from qformer_captioner.pretraining_qformer import QFormerForPretraining
from qformer_captioner.texts_qformer import TextBatch

from ..fixtures import tiny

CLS, SEP, DEC = 1, 2, 3


def texts_of(lengths: list[list[int]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random texts `[B, K, T]` of these lengths, and their mask. A length of 0 is padding."""
    torch.manual_seed(seed)
    longest = max(max(row) for row in lengths)
    sizes = torch.tensor([row + [0] * (max(map(len, lengths)) - len(row)) for row in lengths])
    mask = (torch.arange(longest) < sizes[..., None]).long()
    ids = torch.randint(4, tiny.WORDS, mask.shape)
    ids[..., 0] = CLS
    ids.scatter_(-1, (sizes[..., None] - 1).clamp(min=0), SEP)
    return {"input_ids": ids * mask, "attention_mask": mask}


def run_layers(model, queries, text, allowed, features):
    """Run the layers on one row, `[L, Dq]`, where `allowed` (`[L, L]`) says which token attends to which."""
    qformer, count = model.qformer, len(queries)
    states = qformer.layernorm(torch.cat([queries, text]))
    mask = torch.where(allowed, 0.0, -torch.inf).to(states)
    for layer in qformer.encoder.layer:
        attention = layer.attention.attention
        states = layer.attention.output(attend(attention, states, states, mask), states)
        queries, text = states[:count], states[count:]
        if layer.has_cross_attention and count:
            attended = attend(layer.crossattention.attention, queries, features, torch.zeros(1))
            queries = layer.crossattention.output(attended, queries)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
        text = layer.output(layer.intermediate(text), text)
        states = torch.cat([queries, text])
    return states[:count], states[count:]


def attend(attention, states, others, mask):
    heads = [
        functional.softmax(q @ k.T / q.shape[1] ** 0.5 + mask, dim=1) @ v
        for q, k, v in zip(
            *(x.chunk(attention.num_heads, dim=1) for x in (attention.query(states), attention.key(others))),
            attention.value(others).chunk(attention.num_heads, dim=1),
            strict=True,
        )
    ]
    return torch.cat(heads, dim=1)


def losses_of(model: QFormerForPretraining, features, input_ids, attention_mask, negative_images, negative_texts):
    """Return the three losses, written down as in the paper."""
    queries = model.qformer.query_tokens[0]
    none, size = queries[:0], len(queries)
    images, texts = [], []
    for number, (rows, masks) in enumerate(zip(input_ids, attention_mask, strict=True)):
        texts += [(number, ids[mask.bool()]) for ids, mask in zip(rows, masks, strict=True) if mask.any()]
    for row in features:
        states, _ = run_layers(model, queries, none, torch.ones(size, size, dtype=torch.bool), row)
        images.append(functional.normalize(model.vision_projection(states), dim=1))
    vectors = []
    for _, ids in texts:
        allowed = torch.ones(len(ids), len(ids), dtype=torch.bool)
        _, states = run_layers(model, none, model.qformer.embeddings(ids[None])[0], allowed, None)
        vectors.append(functional.normalize(model.text_projection(states[0]), dim=0))
    scale = model.logit_scale.exp()
    logits = torch.stack([torch.stack([(image @ text).max() * scale for text in vectors]) for image in images])
    right = right_pairs_of(texts)
    itc = contrast(model, logits, right)

    everything = set(itertools.product(range(len(images)), range(len(texts))))
    pairs = [(image, text, 1) for text, (image, _) in enumerate(texts)]
    for text, (image, _) in enumerate(texts):
        wrong = everything - right
        if any(pair[1] == text for pair in wrong):
            pairs.append((int(negative_images[text]), text, 0))
        if any(pair[0] == image for pair in wrong):
            pairs.append((image, int(negative_texts[text]), 0))
    assert all((pair[:2] in right) == bool(pair[2]) for pair in pairs)
    itm = []
    for image, text, label in pairs:
        embedded = model.qformer.embeddings(texts[text][1][None])[0]
        length = size + len(embedded)
        states, _ = run_layers(model, queries, embedded, torch.ones(length, length, dtype=torch.bool), features[image])
        itm.append(-model.itm_head(states).mean(dim=0).log_softmax(dim=0)[label])

    itg = []
    for image, ids in texts:
        inputs = torch.cat([torch.tensor([DEC]), ids[1:]])
        embedded = model.qformer.embeddings(inputs[None])[0]
        length = size + len(embedded)
        allowed = torch.tril(torch.ones(length, length, dtype=torch.bool))
        allowed[:size, :size] = True
        _, states = run_layers(model, queries, embedded, allowed, features[image])
        log_probs = model.lm_head(states[:-1]).log_softmax(dim=1)
        smoothing = model.config.label_smoothing
        right = log_probs[torch.arange(len(ids) - 1), ids[1:]]
        itg += list(-(1 - smoothing) * right - smoothing * log_probs.mean(dim=1))
    return itc, torch.stack(itm).mean(), torch.stack(itg).mean()


def right_pairs_of(texts):
    """Return the pairs of an image and a text that is its own or equal to one of its own."""
    return {
        (image, number)
        for number, (_, ids) in enumerate(texts)
        for image, other in texts
        if ids.tolist() == other.tolist()
    }


def contrast(model, logits, right):
    num_images, num_texts = logits.shape
    if model.config.itc_loss == "sigmoid":
        total = torch.zeros(())
        for pair in itertools.product(range(num_images), range(num_texts)):
            sign = 1 if pair in right else -1
            total = total - functional.logsigmoid(sign * (logits[pair] + model.logit_bias))
        return total / num_texts
    smoothing, to_text, to_image = model.config.label_smoothing, [], []
    for image, row in enumerate(logits.log_softmax(dim=1)):
        own = [text for text in range(num_texts) if (image, text) in right]
        to_text.append(-(1 - smoothing) * row[own].mean() - smoothing * row.mean())
    for text, column in enumerate(logits.t().log_softmax(dim=1)):
        own = [image for image in range(num_images) if (image, text) in right]
        to_image.append(-(1 - smoothing) * column[own].mean() - smoothing * column.mean())
    return (torch.stack(to_text).mean() + torch.stack(to_image).mean()) / 2


ONE_TEXT, SEVERAL_TEXTS = [[5], [9], [3]], [[5, 4, 7], [3], [8, 3]]
# Where texts are, and the place of another text that each is equal to.
EQUAL_TEXTS = {(1, 0): (0, 0), (2, 0): (0, 1)}
# The first text has no wrong image, and the first image no wrong text.
ONLY_RIGHT = {(1, 0): (0, 0), (2, 0): (0, 0)}


@pytest.mark.parametrize("itc_loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("lengths", "equal"),
    [(ONE_TEXT, {}), (SEVERAL_TEXTS, {}), ([[5, 4], [5, 3], [4]], EQUAL_TEXTS), ([[5, 4], [5], [5]], ONLY_RIGHT)],
    ids=["one text", "several texts", "equal texts", "texts without wrong pairs"],
)
def test_losses_and_gradients_equal_the_mathematics(itc_loss, attention, lengths, equal, monkeypatch):
    monkeypatch.setattr(pretraining_qformer, "PAIRS_OF_A_CHUNK", 4)
    torch.manual_seed(0)
    model = tiny.pretraining_model(vision=None, text={"num_hidden_layers": 3}, itc_loss=itc_loss).double()
    model.set_attn_implementation({"qformer_config": attention})
    features, texts = torch.randn(len(lengths), 6, tiny.VISION_WIDTH).double(), texts_of(lengths)
    for place, other in equal.items():
        texts["input_ids"][place] = texts["input_ids"][other]
    output = model(image_embeds=features, **texts)
    output.loss.backward()
    ours = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    negatives = {name: output[name] for name in ("negative_images", "negative_texts")}
    expected = losses_of(model, features, **texts, **negatives)
    sum(expected).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters()}
    # Losses are computed in float32, whatever the dtype of the weights.
    tolerance = dict(rtol=1e-5, atol=5e-6, check_dtype=False)
    torch.testing.assert_close((output.itc_loss, output.itm_loss, output.itg_loss), expected, **tolerance)
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_evaluation_has_the_losses_of_training_without_gradients(monkeypatch):
    monkeypatch.setattr(pretraining_qformer, "PAIRS_OF_A_CHUNK", 4)
    model = tiny.pretraining_model(vision=None)
    batch = {"image_embeds": torch.randn(3, 6, tiny.VISION_WIDTH)} | texts_of([[5], [9], [3]])
    torch.manual_seed(0)
    expected = model(**batch)
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**batch)
    assert expected.loss.requires_grad and not output.loss.requires_grad
    torch.testing.assert_close([*output.values()], [value.detach() for value in expected.values()])


def test_padded_features_do_not_change_the_losses():
    torch.manual_seed(0)
    model = tiny.pretraining_model(vision=None, itm_weight=0.0).double()
    features, texts = torch.randn(3, 6, tiny.VISION_WIDTH).double(), texts_of([[5], [9, 4], [3]])
    expected = model(image_embeds=features, **texts).loss
    padded = torch.cat([torch.full((3, 2, tiny.VISION_WIDTH), torch.nan), features], dim=1).double()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]] * 3)
    torch.testing.assert_close(model(image_embeds=padded, image_attention_mask=mask, **texts).loss, expected)


def test_the_temperature_is_bounded_in_evaluation_as_in_training():
    model = tiny.pretraining_model(vision=None, itm_weight=0.0)
    features, texts = torch.randn(3, 6, tiny.VISION_WIDTH), texts_of([[5], [9], [3]])
    with torch.no_grad():
        model.logit_scale.fill_(10.0)  # an optimizer step may pass the bound
        assert model(image_embeds=features, **texts).logits_per_image.abs().max() <= 100.001


@pytest.mark.parametrize("itc_weight", [0.0, 1.0])
def test_neither_an_image_that_appears_twice_nor_its_captions_are_drawn_as_wrong(itc_weight):
    model = tiny.pretraining_model(vision=None, itc_weight=itc_weight)
    features, texts = torch.randn(3, 6, tiny.VISION_WIDTH), texts_of([[5, 4], [9, 3], [3, 7]])
    twice = torch.tensor([0, 1, 0, 2])
    image_of_text = torch.arange(4).repeat_interleave(2)
    for _ in range(10):
        output = model(image_embeds=features[twice], **{name: part[twice] for name, part in texts.items()})
        assert not (twice[output.negative_images] == twice[image_of_text]).any()
        assert not (twice[image_of_text[output.negative_texts]] == twice[image_of_text]).any()


def test_equal_texts_are_found_in_texts_of_other_lengths():
    ids = torch.tensor([[1, 5, 2, 0], [1, 5, 6, 2], [1, 5, 2, 9], [1, 5, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    right = TextBatch(ids, mask, torch.arange(4)).right_pairs(4)
    assert right.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
