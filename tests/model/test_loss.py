"""Logits are computed at labels only, and in chunks for a large vocabulary, with equal losses and gradients."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, language_qformer
from qformer_captioner.language_qformer import LogitsHead, decoder_of

from ..fixtures import tiny

OTHERS = {  # between hidden states and logits: a scale, a cap, a factor, a bias, layers, heads with more inputs
    "cohere": dict(model_type="cohere", **tiny.LLAMA, logit_scale=0.3),
    "gemma2": dict(model_type="gemma2", **tiny.LLAMA, head_dim=12, final_logit_softcapping=2.0),
    "granite": dict(model_type="granite", **tiny.LLAMA, logits_scaling=3.0),
    "phi": dict(model_type="phi", **tiny.LLAMA),
    "falcon_h1": dict(model_type="falcon_h1", **tiny.LLAMA, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4),
    "t5gemma": dict(
        model_type="t5gemma",
        encoder=dict(**tiny.LLAMA, head_dim=12, final_logit_softcapping=2.0, vocab_size=tiny.WORDS),
        decoder=dict(**tiny.LLAMA, head_dim=12, final_logit_softcapping=2.0, vocab_size=tiny.WORDS),
    ),
    "mixtral": dict(model_type="mixtral", **tiny.LLAMA, num_local_experts=4),
    "mamba": dict(model_type="mamba", hidden_size=tiny.TEXT_WIDTH, num_hidden_layers=2, state_size=8),
    "bert": dict(model_type="bert", **tiny.LAYERS, hidden_size=tiny.TEXT_WIDTH, intermediate_size=64, is_decoder=True),
    "modernbert-decoder": dict(
        model_type="modernbert-decoder", **tiny.LAYERS, hidden_size=tiny.TEXT_WIDTH, sep_token_id=1
    )
    | dict(intermediate_size=64, cls_token_id=1),
    "llama4_text": dict(
        model_type="llama4_text", **tiny.LLAMA, head_dim=12, num_local_experts=2, intermediate_size_mlp=64
    ),
    "mt5": dict(model_type="mt5", **tiny.T5),
}


def captioner(language: str) -> QFormerCaptioner:
    if language in tiny.TEXT:
        return tiny.captioner(language=language)
    torch.manual_seed(0)
    special_tokens = dict(vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    config = QFormerCaptionerConfig(
        vision_config=tiny.vision_config("clip"),
        text_config=AutoConfig.for_model(**OTHERS[language], **special_tokens),
        qformer_config=tiny.QFORMER,
    )
    return QFormerCaptioner(config).eval()


def batch() -> dict[str, torch.Tensor]:
    """Return three images with two captions of different lengths; the last image has one caption."""
    labels = torch.full((3, 2, 6), -100)
    generator = torch.Generator().manual_seed(3)
    for image, caption, length in [(0, 0, 5), (0, 1, 2), (1, 0, 3), (1, 1, 5), (2, 0, 4)]:
        labels[image, caption, :length] = torch.randint(3, tiny.WORDS, (length,), generator=generator)
        labels[image, caption, length] = 1
    return {**tiny.batch(), "labels": labels}


def loss_and_gradients(model: torch.nn.Module, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


class Largest(TorchDispatchMode):
    """Mode that records the largest array of logits: its last dimension is the vocabulary, and it is not a weight."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        shape = tuple(result.shape) if isinstance(result, torch.Tensor) else ()
        if shape[-1:] == (tiny.WORDS,) and shape != (tiny.TEXT_WIDTH, tiny.WORDS):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("language", [*tiny.TEXT, *OTHERS])
def test_the_logits_head_computes_the_logits_of_the_language_model(language):
    model = captioner(language).language_model
    ids = torch.tensor([[5, 9, 17, 4]])
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    hidden_states = []
    decoder_of(model).register_forward_hook(
        lambda module, inputs, output: hidden_states.append(output.last_hidden_state)
    )
    expected = model(input_ids=ids, **inputs).logits
    torch.testing.assert_close(LogitsHead(model)(hidden_states[0][0]), expected[0])


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("language", [*tiny.TEXT, "gemma2", "cohere", "bert", "modernbert-decoder", "llama4_text"])
def test_loss_and_gradients_in_chunks_are_those_of_all_logits(language, frozen, monkeypatch):
    model = captioner(language)
    model.language_model.requires_grad_(not frozen)
    expected_loss, expected = loss_and_gradients(model, **batch(), skip_logits=False)
    monkeypatch.setattr(
        language_qformer, "MAX_LOGITS_PER_CHUNK", 23 * tiny.WORDS
    )  # 23 of the 24 positions, and then one
    loss, gradients = loss_and_gradients(model, **batch(), skip_logits=True)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_an_adapter_on_the_output_layer_has_the_same_gradients_in_chunks(monkeypatch):
    config = LoraConfig(r=2, target_modules=r"language_model\.(lm_head|.*\.q_proj)", init_lora_weights=False)
    model = get_peft_model(tiny.captioner(), config).eval()
    expected_loss, expected = loss_and_gradients(model, **batch())
    monkeypatch.setattr(language_qformer, "MAX_LOGITS_PER_CHUNK", 4 * tiny.WORDS)
    loss, gradients = loss_and_gradients(model, **batch(), skip_logits=True)
    torch.testing.assert_close(loss, expected_loss)
    assert any("lm_head" in name for name in gradients)
    for name in expected:
        assert (gradients[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_no_array_of_logits_is_larger_than_the_limit(language, monkeypatch):
    model = captioner(language)
    model.requires_grad_(False)
    model.qformer.requires_grad_(True)
    monkeypatch.setattr(language_qformer, "MAX_LOGITS_PER_CHUNK", 4 * tiny.WORDS)
    with Largest() as largest:
        loss_and_gradients(model.train(), **batch())
    assert largest.elements == 4 * tiny.WORDS
    with Largest() as largest:
        loss_and_gradients(model, **batch(), skip_logits=False)
    assert largest.elements == 3 * 2 * 6 * tiny.WORDS  # at labels, and not at the prompt


def test_logits_are_skipped_in_training_if_there_are_many_and_labels(monkeypatch):
    model = captioner("llama").train()
    assert model(**batch()).logits is not None
    monkeypatch.setattr(language_qformer, "MAX_LOGITS_PER_CHUNK", 30 * tiny.WORDS)
    assert model(**batch()).logits is None
    assert model(**{**batch(), "labels": None}).logits is not None
    assert model(**batch(), skip_logits=False).logits.shape == (3, 2, 6, tiny.WORDS)


def test_logits_are_there_in_evaluation_however_many_they_are(monkeypatch):
    monkeypatch.setattr(language_qformer, "MAX_LOGITS_PER_CHUNK", 1)
    model = captioner("llama")
    assert model(**batch()).logits.shape == (3, 2, 6, tiny.WORDS)
    assert model(**batch(), skip_logits=True).logits is None


@pytest.mark.parametrize("skip_logits", [True, False])
def test_the_nats_of_each_caption_add_up_to_the_loss(skip_logits):
    model, inputs = captioner("llama"), batch()
    output = model(**inputs, skip_logits=skip_logits)
    torch.testing.assert_close(output.losses.sum() / (inputs["labels"] != -100).sum(), output.loss)
    for caption in (0, 1):
        alone = model(**{**inputs, "labels": inputs["labels"][:, caption]})
        torch.testing.assert_close(output.losses[:, caption], alone.losses)
    assert output.losses[2, 1] == 0
    assert not output.losses.requires_grad


def test_a_batch_without_captions_has_a_loss_of_zero_in_chunks():
    inputs = batch() | {"labels": torch.full((3, 2, 6), -100)}
    loss, gradients = loss_and_gradients(captioner("llama"), **inputs, skip_logits=True)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_without_grad_no_gradient_is_computed(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    model = captioner("llama")  # all parts are trainable
    with torch.no_grad():
        assert model(**batch(), skip_logits=True).loss > 0


@pytest.mark.parametrize("language", ["llama", "t5"])
@pytest.mark.parametrize(
    "labels", [torch.tensor([[5, 6, 1], [7, 1, -100]]), torch.tensor([[[5, 1]] * 2, [[7, 1]] * 2])]
)
def test_the_loss_is_a_function_of_the_logits(language, labels):
    model = tiny.captioner("clip", language)
    outputs = model(tiny.images(2), labels=labels)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    tokens, is_token = labels.clamp(min=0), labels != -100
    expected = outputs.logits.softmax(dim=-1) - torch.nn.functional.one_hot(tokens, tiny.WORDS)
    torch.testing.assert_close(gradient, expected * is_token[..., None] / is_token.sum())
