"""Language models in 4 or 8 bits: quantised layers, gradients, saving and loading."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, BitsAndBytesConfig

from qformer_captioner import QFormerCaptioner, train_hf
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.export import export

from ..fixtures import tiny
from .test_lora import words

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'qformer-captioner[qlora]'")

BITS = {
    "4 bits": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "8 bits": dict(load_in_8bit=True),
}
BATCH = tiny.batch()
PROMPT = {name: value for name, value in BATCH.items() if name != "labels"}


# Four tokens, and no special ones: a tiny model that knows few words of its captions writes "unknown".
WRITING = dict(max_new_tokens=4, min_new_tokens=4, suppress_tokens=tiny.tokenizer().all_special_ids)


@pytest.fixture(params=BITS)
def bits(request):
    return BitsAndBytesConfig(**BITS[request.param])


def captioner(folder, language="llama", bits=None) -> QFormerCaptioner:
    torch.manual_seed(0)
    model = QFormerCaptioner.from_backbones(folder / "vision", folder / language, **tiny.QFORMER)
    if bits is not None:
        model.quantize_language_model(bits)
    return model


def quantized_layers(model: torch.nn.Module) -> set[str]:
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_layers_of_the_language_model_are_quantised_except_its_output_layer(backbones, bits, language):
    layers = quantized_layers(captioner(backbones, language, bits))
    assert layers and all(name.startswith("language_model.") for name in layers)
    assert not [name for name in layers if "lm_head" in name or name.endswith(".wo")]  # T5's `wo` overflows first


def test_gradients_are_the_same_after_an_evaluation(backbones, bits):
    model = captioner(backbones, bits=bits)
    gradients = []
    for _ in range(2):
        model.train()
        model(**BATCH).loss.backward()
        gradients.append(model.qformer.query_tokens.grad.clone())
        model.zero_grad()
        model.eval().generate(**PROMPT, max_new_tokens=3)
        model(**BATCH)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_four_bits_compute_with_their_dequantised_weights(backbones):
    """Plain layers with the same rounded weights give the same loss and gradients."""
    model = captioner(backbones, bits=BitsAndBytesConfig(**BITS["4 bits"]))
    results = []
    for _ in range(2):
        loss = model(**BATCH).loss
        loss.backward()
        results.append((loss, model.qformer.query_tokens.grad.clone()))
        model.zero_grad()
        for name in quantized_layers(model):
            weight = model.get_submodule(name).weight
            plain = torch.nn.Linear(*reversed(weight.quant_state.shape), bias=False)
            plain.weight = torch.nn.Parameter(bnb.functional.dequantize_4bit(weight.data, weight.quant_state))
            model.set_submodule(name, plain)
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
@pytest.mark.parametrize("included", [False, True])
def test_a_saved_captioner_opens_quantised_or_not(backbones, bits, tmp_path, included):
    captioner(backbones).save_pretrained(tmp_path, include_backbones=included)
    expected, quantized = (captioner(backbones, bits=each).eval()(**BATCH).logits for each in (None, bits))
    for each, logits in ((None, expected), (bits, quantized)):
        model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, quantization_config=each).eval()
        torch.testing.assert_close(model(**BATCH).logits, logits)
    assert not torch.equal(expected, quantized)


def test_eight_bits_have_nearly_the_same_logits(backbones):
    whole, eight = (captioner(backbones, bits=each) for each in (None, BitsAndBytesConfig(**BITS["8 bits"])))
    alike = torch.cosine_similarity(whole(**BATCH).logits, eight(**BATCH).logits, dim=-1)
    assert alike.mean() > 0.99
    assert all(eight.caption([tiny.picture(0), tiny.picture(1)], **WRITING))


def test_a_quantised_captioner_saves_names_instead_of_quantised_weights(backbones, bits, tmp_path):
    model = captioner(backbones, bits=bits)
    model.save_pretrained(tmp_path)
    assert {name.split(".")[0] for name in load_file(tmp_path / "model.safetensors")} == {
        "qformer",
        "language_projection",
    }
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="quantised language model has rounded weights"):
        model.save_pretrained(tmp_path / "all", include_backbones=True)


def test_quantised_parameters_are_counted_as_before(backbones, bits, capsys):
    captioner(backbones).print_trainable_parameters()
    expected = capsys.readouterr().out
    captioner(backbones, bits=bits).print_trainable_parameters()
    assert capsys.readouterr().out == expected


def test_a_trainable_language_model_is_not_quantised(backbones, bits):
    model = QFormerCaptioner.from_backbones(
        backbones / "vision", backbones / "llama", freeze_language_model=False, **tiny.QFORMER
    )
    with pytest.raises(ValueError, match="quantised language model cannot train"):
        model.quantize_language_model(bits)


@pytest.mark.slow
@pytest.mark.parametrize(("language", "option"), [("llama", "load_in_4bit"), ("t5", "load_in_8bit")])
def test_qlora_opens_quantised_or_not_and_merges(backbones, tmp_path, language, option):
    run = tmp_path / "run"
    train_hf.train(words(backbones, run, language, **{option: "true"}))
    trained = load_file(run / "adapter_model.safetensors")
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in trained.items())

    expected = PeftModel.from_pretrained(QFormerCaptioner.from_pretrained(run / "base"), run).eval()(**BATCH).logits
    export(run, tmp_path / "merged")
    for folder in (run, tmp_path / "merged"):
        model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        torch.testing.assert_close(model(**BATCH).logits, expected, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "again", include_backbones=False)  # there is no other name for what was merged
    again = QFormerCaptioner.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(again(**BATCH).logits, model(**BATCH).logits)

    bits = BitsAndBytesConfig(**{option: True})
    model = AutoModel.from_pretrained(run, trust_remote_code=True, quantization_config=bits).eval()
    assert quantized_layers(model)
    assert any(name.endswith("lora_A.default.weight") for name, _ in model.named_parameters())
    assert all(model.caption([tiny.picture(0), tiny.picture(1)], **WRITING))


@pytest.mark.slow
def test_qlora_resumes_as_if_it_had_never_stopped(backbones, tmp_path):
    train_hf.train(words(backbones, tmp_path / "whole", num_train_epochs=2, load_in_4bit="true"))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    half = words(backbones, tmp_path / "halves", num_train_epochs=2, load_in_4bit="true")
    train_hf.train([*half, "--resume_from_checkpoint", str(checkpoint)])
    whole, halves = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


@pytest.mark.slow
def test_without_adapters_the_q_former_trains_with_a_quantised_model(backbones, tmp_path):
    options = words(backbones, tmp_path / "run", load_in_4bit="true")
    at = options.index("--lora_r")
    train_hf.train([*options[:at], *options[at + 2 :]])
    assert json.loads((tmp_path / "run" / "config.json").read_text())["referenced_backbones"] == ["language_model"]
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModel.from_pretrained(tmp_path / "run", trust_remote_code=True, quantization_config=bits)
    assert model.caption(tiny.picture(), **WRITING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_8bit": "true"}, "--load_in_4bit and --load_in_8bit exclude each other"),
        ({"bnb_4bit_quant_type": "nf5"}, "must be nf4 or fp4, not 'nf5'"),
        ({"freeze_language_model": "false"}, "--lora_r trains adapters on frozen backbones"),
    ],
)
def test_impossible_quantisation_is_refused_before_the_run_starts(backbones, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train_hf.train(words(backbones, tmp_path / "run", load_in_4bit="true", **options))
    assert not (tmp_path / "run").exists()
