"""Several captions behind one prefix: losses, gradients and captions equal those of plain rows."""

import logging

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from qformer_captioner import QFormerCaptioner, QFormerCaptionerConfig, generation_qformer, language_qformer

from ..fixtures import tiny

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GPT = dict(n_embd=tiny.TEXT_WIDTH, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
GPT |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
OTHERS = {
    "qwen3": dict(model_type="qwen3", **tiny.LLAMA, head_dim=12),
    "mistral": dict(model_type="mistral", **tiny.LLAMA, sliding_window=64),
    "phi": dict(model_type="phi", **tiny.LLAMA),
    "phi3": dict(model_type="phi3", **tiny.LLAMA),
    "gpt_neox": dict(model_type="gpt_neox", **tiny.LLAMA),
    "gemma2": dict(model_type="gemma2", **tiny.LLAMA, head_dim=12, sliding_window=64),
    "mixtral": dict(model_type="mixtral", **tiny.LLAMA, num_local_experts=4),
    "gemma3_text": dict(model_type="gemma3_text", **tiny.LLAMA, head_dim=12, sliding_window=64),
    "cohere2": dict(model_type="cohere2", **tiny.LLAMA, sliding_window=64),
    "olmo3": dict(model_type="olmo3", **tiny.LLAMA, sliding_window=64),
    "glm": dict(model_type="glm", **tiny.LLAMA, head_dim=12),
    "glm4": dict(model_type="glm4", **tiny.LLAMA, head_dim=12),
    "granitemoe": dict(model_type="granitemoe", **tiny.LLAMA, num_local_experts=4),
    "qwen2_moe": dict(model_type="qwen2_moe", **tiny.LLAMA, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": dict(model_type="qwen3_moe", **tiny.LLAMA, **EXPERTS, head_dim=12),
    "gptj": dict(model_type="gptj", **GPT, rotary_dim=8),
    "codegen": dict(model_type="codegen", **GPT, rotary_dim=8),
    "gpt_bigcode": dict(model_type="gpt_bigcode", **GPT),
    **{
        name: dict(model_type=name, **tiny.LLAMA)
        for name in (
            *("afmoe", "apertus", "arcee", "biogpt", "bitnet", "cohere", "cwm", "ernie4_5", "exaone4", "falcon"),
            *("gpt_neox_japanese", "granite", "jais2", "ministral3", "nanochat", "nemotron", "olmo", "olmo2"),
            *("persimmon", "seed_oss", "smollm3", "starcoder2"),
        )
    },
    **{
        name: dict(model_type=name, **tiny.LLAMA, **EXPERTS, num_local_experts=4, moe_num_experts=4, n_routed_experts=4)
        for name in ("ernie4_5_moe", "flex_olmo", "granitemoeshared", "minimax_m2", "olmoe", "phimoe")
    },
    **{
        name: dict(model_type=name, **tiny.LLAMA, **EXPERTS, n_routed_experts=4, n_shared_experts=1)
        for name in ("dots1", "glm4_moe")
    },
    **{name: dict(model_type=name, **tiny.LLAMA, head_dim=12) for name in ("helium", "hunyuan_v1_dense", "ministral")},
    "hunyuan_v1_moe": dict(model_type="hunyuan_v1_moe", **tiny.LLAMA, head_dim=12, num_experts=4, moe_topk=2),
    "stablelm": dict(model_type="stablelm", **tiny.LLAMA, partial_rotary_factor=0.5),
    "xglm": dict(model_type="xglm", d_model=tiny.TEXT_WIDTH, num_layers=2, attention_heads=4, ffn_dim=64)
    | dict(max_position_embeddings=64, init_std=0.2),
    "mamba": dict(model_type="mamba", hidden_size=tiny.TEXT_WIDTH, num_hidden_layers=2, state_size=8),
    "minimax": dict(model_type="minimax", **tiny.LLAMA, head_dim=12, num_local_experts=4)
    | dict(layer_types=["linear_attention", "full_attention"]),
    "gpt_neo": dict(model_type="gpt_neo", hidden_size=tiny.TEXT_WIDTH, num_heads=4, num_layers=2, window_size=16)
    | dict(attention_types=[[["global", "local"], 1]], max_position_embeddings=64, initializer_range=0.2),
    "mt5": dict(model_type="mt5", **tiny.T5, initializer_factor=2.0),
    "mbart": dict(model_type="mbart", **tiny.BART, decoder_start_token_id=2, forced_eos_token_id=None),
    "umt5": dict(model_type="umt5", **tiny.T5, initializer_factor=2.0),
}
T5_KINDS = ["t5", "flan-t5", "mt5", "umt5"]
FAMILIES = [
    "llama",
    "qwen2",
    "gpt2",
    "opt",
    "gemma",
    "qwen3",
    "mistral",
    "phi",
    "phi3",
    "gpt_neox",
    "gemma2",
    "mixtral",
]


def other_text_config(language: str, **fields) -> PreTrainedConfig:
    special_tokens = dict(vocab_size=tiny.WORDS, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    return AutoConfig.for_model(**OTHERS[language] | special_tokens | fields)


def captioner(language: str, **fields) -> QFormerCaptioner:
    if language in tiny.TEXT:
        return tiny.captioner(language=language)
    torch.manual_seed(0)
    text = other_text_config(language, **fields)
    model = QFormerCaptioner(
        QFormerCaptionerConfig(vision_config=tiny.vision_config("clip"), text_config=text, qformer_config=tiny.QFORMER)
    )
    torch.nn.init.normal_(model.language_projection.weight, std=0.2)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    """Return three images with prompts of different lengths and four captions each, the second image with three."""
    inputs = tiny.batch()
    labels = torch.full((3, 4, 7), -100)
    generator = torch.Generator().manual_seed(3)
    for image in range(3):
        for caption in range(3 if image == 1 else 4):
            length = 1 + (image + 2 * caption) % 6
            labels[image, caption, :length] = torch.randint(3, tiny.WORDS, (length,), generator=generator)
            labels[image, caption, length] = 1
    return {**inputs, "labels": labels}


def losses_and_gradients(model: QFormerCaptioner) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(**batch())
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return output.loss, output.logits[batch()["labels"] != -100], gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", language_qformer.PREFIX_SHARING_MODELS)
def test_loss_logits_and_gradients_equal_those_of_one_row_per_caption(language, attention, monkeypatch):
    model = captioner(language)
    if language == "gemma2" and attention == "sdpa":
        pytest.skip("transformers gives Gemma 2 eager attention only")
    model.set_attn_implementation(attention)
    assert language_qformer.shares_prefix(model.language_model, 20)
    loss, logits, gradients = losses_and_gradients(model)
    monkeypatch.setattr(language_qformer, "PREFIX_SHARING_MODELS", ())
    expected_loss, expected_logits, expected = losses_and_gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("language", "fields", "length", "reason"),
    [
        ("bloom", {}, 20, "the model type 'bloom' is not tested"),
        ("falcon", {"alibi": True}, 20, "ALiBi counts the positions"),
        ("mistral", {"sliding_window": 8}, 20, "the sliding window 8 is shorter than 20 positions"),
        ("olmo3", {"layer_types": ["full_attention", "linear_attention"]}, 20, "layers of the types"),
    ],
)
def test_the_reason_not_to_share_a_prefix_is_logged(language, fields, length, reason, monkeypatch):
    model = captioner(language, **({} if language == "olmo3" else fields)).language_model
    vars(model.config).update(fields)
    messages: list[str] = []
    monkeypatch.setattr(language_qformer.logger, "debug", messages.append)
    assert not language_qformer.shares_prefix(model, length)
    assert len(messages) == 1 and reason in messages[0]


@pytest.mark.parametrize("language", ["llama", "gpt2", "t5"])
def test_ignored_labels_may_occur_anywhere(language):
    model, inputs = captioner(language), batch()
    inputs["labels"][0, 2, 1] = inputs["labels"][1, 1, :2] = inputs["labels"][2, 0, 0] = -100
    together = model(**inputs).losses
    one_by_one = [model(**{**inputs, "labels": inputs["labels"][:, caption]}).losses for caption in range(4)]
    torch.testing.assert_close(together, torch.stack(one_by_one, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("language", ["llama", "bloom", "t5", "bart"])
def test_captions_may_be_padded_on_either_side(language):
    model, inputs = captioner(language), batch()
    right, length = inputs["labels"], inputs["labels"].shape[2]
    left = torch.stack([row.roll(length - int((row != -100).sum())) for row in right.flatten(0, 1)]).view_as(right)
    assert not torch.equal(left, right)
    padded_left, padded_right = model(**{**inputs, "labels": left}), model(**inputs)
    torch.testing.assert_close(padded_left.losses, padded_right.losses)
    torch.testing.assert_close(padded_left.logits[left != -100], padded_right.logits[right != -100])


@pytest.mark.parametrize("language", FAMILIES)
def test_an_image_is_one_sequence_without_padding_between_captions(language):
    model = captioner(language)
    shapes = []
    model.language_model.get_decoder().register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(inputs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    model(**batch())
    prefix = tiny.QUERIES + tiny.batch()["input_ids"].shape[1]
    is_label = batch()["labels"] != -100
    inputs = is_label.sum(dim=(1, 2)) - is_label.any(dim=2).sum(dim=1)  # the last token of a caption predicts nothing
    assert shapes == [(3, prefix + inputs.max())]  # the image with the most tokens has no padding


@pytest.mark.parametrize(
    ("language", "fields"),
    [("mistral", {"sliding_window": 8}), ("gemma2", {"sliding_window": 8}), ("bloom", {}), ("gpt_neo", {})],
)
def test_other_models_get_one_row_per_caption_and_one_warning(language, fields):
    model = captioner(language, **fields)
    messages = []
    logger = transformers_logging.get_logger("qformer_captioner.language_qformer")
    type(logger).warning_once.cache_clear()  # another test may have logged it
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        output = model(**batch())
        model(**batch())
    finally:
        logger.removeHandler(handler)
    assert [line for line in messages if "cannot share a prefix among the captions" in line] == messages
    assert len(messages) == 1
    one_by_one = [
        model(**{**batch(), "labels": batch()["labels"][:, caption], "num_items_in_batch": 1}).loss
        for caption in range(4)
    ]
    number = (batch()["labels"] != -100).sum()
    torch.testing.assert_close(output.loss, sum(one_by_one) / number, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("language", [*T5_KINDS, "bart", "mbart"])
def test_an_encoder_decoder_computes_the_same_caption_by_caption(language, attention):
    model = captioner(language)
    model.set_attn_implementation(attention)
    loss, _, gradients = losses_and_gradients(model)
    model.zero_grad()
    number = (batch()["labels"] != -100).sum()
    expected = sum(
        model(**{**batch(), "labels": batch()["labels"][:, caption], "num_items_in_batch": number}).loss
        for caption in range(4)
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert (gradients[name] - weight.grad).norm() <= 1e-4 * weight.grad.norm() + 1e-5, name


@pytest.mark.parametrize("language", ["t5", "bart", "mbart"])
def test_training_starts_the_decoder_where_generation_does(language):
    model, inputs = captioner(language), tiny.batch()
    model.generation_config.decoder_start_token_id = 7  # a file of decoding defaults may be the only place that has it
    written = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    torch.testing.assert_close(model(**inputs).logits[:, 0], written.logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("language", T5_KINDS)
def test_the_decoder_of_a_t5_gets_each_image_once(language):
    model = captioner(language)
    batch_sizes = []
    model.language_model.get_decoder().register_forward_pre_hook(
        lambda module, args, inputs: batch_sizes.append(inputs["encoder_hidden_states"].shape[0]), with_kwargs=True
    )
    model(**batch())
    assert batch_sizes == [3]


# --- Beams and samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(num_beams=1), dict(num_beams=3), dict(num_beams=4, num_return_sequences=2, length_penalty=0.5)]
)
@pytest.mark.parametrize("language", [*FAMILIES, "bloom", "gpt_neo", "minimax"])
def test_beams_that_share_a_prefix_write_the_same_captions(language, options):
    model = captioner(language, **({"sliding_window": 8} if language in ("mistral", "gemma2") else {}))
    inputs = {name: tensor for name, tensor in tiny.batch().items() if name != "labels"}
    options = dict(options, max_new_tokens=6, return_dict_in_generate=True, output_scores=True)
    written = model.generate(**inputs, **options)
    prefix, mask = model.get_prefix(
        model.get_soft_prompt(inputs["pixel_values"]), inputs["input_ids"], inputs["attention_mask"]
    )
    expected = model.language_model.generate(inputs_embeds=prefix, attention_mask=mask, **options)
    assert written.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(written.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [dict(num_beams=4), dict(do_sample=True, num_return_sequences=4), {}])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
def test_the_prefix_is_encoded_once_for_each_image(prompt, options):
    model, inputs = captioner("llama"), tiny.batch()
    inputs = {name: inputs[name] for name in ("pixel_values", *(["input_ids", "attention_mask"] if prompt else []))}
    shapes = []
    model.language_model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: (
            shapes.append(given["inputs_embeds"].shape[:2]) if given.get("inputs_embeds") is not None else None
        ),
        with_kwargs=True,
    )
    model.generate(**inputs, max_new_tokens=3, **options)
    prefix = tiny.QUERIES + (inputs["input_ids"].shape[1] if prompt else 0)
    assert shapes == [(3, prefix - 1), (3 * (4 if options else 1), 1)]


@pytest.mark.parametrize("options", [dict(use_cache=False), dict(use_cache=False, num_beams=3)])
def test_use_cache_false_gives_the_language_model_no_cache(options, monkeypatch):
    model, inputs = captioner("llama"), tiny.batch()
    monkeypatch.setattr(generation_qformer, "prefill_shared_prefix", None)
    assert model.generate(**inputs, max_new_tokens=3, **options).shape == (3, 3)


def test_hidden_states_and_attentions_are_those_of_the_whole_prefix():
    model, inputs = captioner("llama"), tiny.batch()
    model.set_attn_implementation("eager")
    written = model.generate(
        **inputs, max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True
    )
    prefix = tiny.QUERIES + inputs["input_ids"].shape[1]
    assert written.hidden_states[0][0].shape[1] == prefix
    assert written.attentions[0][0].shape[-2:] == (prefix, prefix)
