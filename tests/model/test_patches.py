"""Patches of other libraries. A test fails when its patch is no longer needed: then delete both."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer_captioner.backbones_qformer import keep_gradients_on_cpu, untie_t5_head

from ..fixtures import tiny


def test_transformers_still_ties_the_output_layer_of_flan_t5():
    """Fails when `untie_t5_head` is no longer needed (huggingface/transformers#42815)."""
    model = AutoModelForSeq2SeqLM.from_config(tiny.text_config("flan-t5"))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.tie_weights()
    assert model.lm_head.weight is model.shared.weight


def test_untie_t5_head_keeps_the_output_layer():
    model = AutoModelForSeq2SeqLM.from_config(tiny.text_config("flan-t5"))
    untie_t5_head(model)
    head = model.lm_head.weight
    model.tie_weights()
    assert model.lm_head.weight is head
    assert head is not model.shared.weight


def test_untie_t5_head_leaves_other_models_alone():
    model = AutoModelForSeq2SeqLM.from_config(tiny.text_config("t5"))
    untie_t5_head(model)
    assert model.lm_head.weight is model.shared.weight


@pytest.mark.parametrize("patched", [False, True])
def test_bitsandbytes_loses_gradients_on_a_cpu_after_an_evaluation(patched):
    """Fails when `keep_gradients_on_cpu` is no longer needed (bitsandbytes-foundation/bitsandbytes#1804)."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'qformer-captioner[qlora]'")
    if not bnb.functional.has_avx512bf16():
        pytest.skip("needs a CPU with AVX-512 BF16")
    layer = bnb.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    if patched:
        keep_gradients_on_cpu(layer)
    layer(torch.randn(2, 64))  # repacks the weights of a layer without the patch
    inputs = torch.randn(2, 64, requires_grad=True)
    outputs = layer(inputs)
    if outputs.requires_grad:
        outputs.sum().backward()
    assert (inputs.grad is not None) == patched


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
def test_transformers_still_exempts_tokens_after_padded_embeddings_from_the_repetition_penalty():
    """Fails when `penalize_repetition` is no longer needed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.text_config("llama")).eval()
    embeds, mask = torch.randn(8, 6, tiny.TEXT_WIDTH), torch.tensor([[0, 0, 0, 1, 1, 1]] * 8)
    options = dict(max_new_tokens=6, min_new_tokens=6, repetition_penalty=100.0)
    padded = model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    alone = model.generate(inputs_embeds=embeds[:, 3:], attention_mask=mask[:, 3:], **options)
    assert alone.tolist() != padded.tolist()
