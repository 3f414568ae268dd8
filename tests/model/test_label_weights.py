"""Weights of captions: each multiplies the loss of its caption, in chunks and with all logits."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qformer_captioner import language_qformer

from ..fixtures import tiny
from .test_loss import batch, loss_and_gradients

WEIGHTS = torch.tensor([[1.5, -2.0], [0.0, 0.25], [-1.0, 7.0]])  # the last caption has no labels


@pytest.mark.parametrize("skip_logits", [True, False], ids=["chunks", "all logits"])
@pytest.mark.parametrize("language", ["llama", "gpt2", "t5", "bart", "bloom"])
def test_a_weight_multiplies_the_loss_and_gradient_of_its_caption(language, skip_logits, monkeypatch):
    monkeypatch.setattr(language_qformer, "MAX_LOGITS_PER_CHUNK", 5 * tiny.WORDS)
    model, inputs = tiny.captioner(language=language), batch()
    expected_loss, expected = 0.0, {}
    for image, caption in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]:  # each alone, without packing
        labels = torch.full_like(inputs["labels"][:, 0], -100)
        labels[image] = inputs["labels"][image, caption]
        loss, gradients = loss_and_gradients(model, **inputs | {"labels": labels}, num_items_in_batch=1)
        expected_loss += WEIGHTS[image, caption] * loss
        for name, gradient in gradients.items():
            expected[name] = expected.get(name, 0) + WEIGHTS[image, caption] * gradient
    loss, gradients = loss_and_gradients(
        model, **inputs, label_weights=WEIGHTS, num_items_in_batch=1, skip_logits=skip_logits
    )
    torch.testing.assert_close(loss, expected_loss)
    rounding = 1e-6 * max(gradient.norm() for gradient in expected.values())  # gradients of key biases are zero
    for name in gradients:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + rounding, name


@pytest.mark.parametrize("skip_logits", [True, False])
def test_weights_change_neither_the_divisor_nor_the_losses_of_captions(skip_logits):
    model, inputs = tiny.captioner(), batch()
    plain = model(**inputs, skip_logits=skip_logits)
    weighted = model(**inputs, label_weights=torch.full((3, 2), 3.0), skip_logits=skip_logits)
    torch.testing.assert_close(weighted.loss, 3 * plain.loss)
    torch.testing.assert_close(weighted.losses, plain.losses)


def test_captions_in_rows_take_weights_in_rows_or_by_image():
    model, inputs = tiny.captioner(), batch()
    expected = model(**inputs, label_weights=WEIGHTS).loss
    rows = inputs | {"labels": inputs["labels"].flatten(0, 1)}  # [B*K, T]
    for weights in (WEIGHTS, WEIGHTS.flatten()):
        torch.testing.assert_close(model(**rows, label_weights=weights).loss, expected)
    one = inputs | {"labels": inputs["labels"][:, 0]}  # [B, T]
    weighted = model(**one, label_weights=WEIGHTS[:, 0])
    count = (one["labels"] != -100).sum()
    torch.testing.assert_close(weighted.loss, (WEIGHTS[:, 0] * weighted.losses).sum() / count)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_weights_of_zero_give_gradients_of_zero(skip_logits):
    loss, gradients = loss_and_gradients(
        tiny.captioner(), **batch(), label_weights=torch.zeros(3, 2), skip_logits=skip_logits
    )
    assert loss == 0
    assert gradients and not any(gradient.any() for gradient in gradients.values())


def test_an_adapter_takes_weights():
    config = LoraConfig(r=2, target_modules=r"language_model\..*\.q_proj", init_lora_weights=False)
    model = get_peft_model(tiny.captioner(), config).eval()
    plain = model(**batch()).losses
    loss = model(**batch(), label_weights=WEIGHTS, num_items_in_batch=2).loss
    torch.testing.assert_close(loss, (WEIGHTS * plain).sum() / 2)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"shape \(3,\) do not fit `labels` of shape \(3, 2, 6\)"),
        (torch.ones(2, 3), r"shape \(2, 3\) do not fit"),
        (torch.ones(3, 2, 6), r"shape \(3, 2, 6\) do not fit"),
        (torch.tensor([[1.0, 2], [3, float("nan")], [5, 6]]), "must be finite"),
        (torch.full((3, 2), float("-inf")), "must be finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        tiny.captioner()(**batch(), label_weights=weights)


def test_weights_without_labels_are_refused():
    with pytest.raises(ValueError, match="`label_weights` weigh the losses of `labels`: pass both, or neither"):
        tiny.captioner()(**batch() | {"labels": None}, label_weights=WEIGHTS)
