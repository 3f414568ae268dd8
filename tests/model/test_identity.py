"""Names of captioners that were made and not loaded, adapters on them, and given dtypes and quantisation."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, pipeline

from qformer_captioner import QFormerCaptioner, saving_qformer
from qformer_captioner.backbones_qformer import bits_and_bytes_config

from ..fixtures import tiny

BATCH = tiny.batch()
LAYERS = dict(r=2, target_modules=r"language_model.*q_proj", init_lora_weights=False)


@pytest.fixture
def made(backbones) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER)


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {weight.dtype for weight in model.parameters()}


def test_an_adapter_on_a_captioner_that_was_made_opens(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.save_pretrained("base")
    adapted = get_peft_model(made, LoraConfig(**LAYERS)).eval()
    adapted.save_pretrained("adapter")
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "base")
    for auto_class in (AutoModel, QFormerCaptioner):
        assert torch.equal(auto_class.from_pretrained("adapter")(**BATCH).loss, adapted(**BATCH).loss)


def test_a_captioner_is_named_after_its_last_folder_unless_it_was_loaded(made, tmp_path):
    assert made.name_or_path == ""
    for name in ("first", "second"):
        made.save_pretrained(tmp_path / name)
        assert made.name_or_path == str(tmp_path / name)
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "copy")
    assert loaded.name_or_path == str(tmp_path / "first")


def test_an_adapter_on_a_captioner_that_was_never_saved_is_reported(made, tmp_path, monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(saving_qformer.logger, "warning_once", messages.append)
    get_peft_model(made, LoraConfig(**LAYERS)).save_pretrained(tmp_path)
    assert messages and "`save_pretrained` before `get_peft_model`" in messages[0]
    with pytest.raises(OSError, match=r"names no captioner.*base_model_name_or_path"):
        QFormerCaptioner.from_pretrained(tmp_path)


# --- Dtypes -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(made, tmp_path):
    made.save_pretrained(tmp_path / "captioner")
    return tmp_path / "captioner"


@pytest.mark.parametrize(
    "options",
    [
        dict(dtype="bfloat16"),
        dict(torch_dtype="bfloat16"),
        dict(dtype="bfloat16", torch_dtype="float32"),
        dict(dtype=torch.bfloat16, load_vision_model=False),
    ],
    ids=str,
)
def test_a_given_dtype_wins(saved, options):
    for auto_class in (AutoModel, QFormerCaptioner):
        assert dtypes(auto_class.from_pretrained(saved, **options)) == {torch.bfloat16}


def test_a_dtype_in_a_given_configuration_wins(saved):
    config = AutoConfig.from_pretrained(saved, dtype="bfloat16")
    assert dtypes(QFormerCaptioner.from_pretrained(saved, config=config)) == {torch.bfloat16}


def test_a_dtype_of_a_pipeline_wins(saved):
    assert dtypes(pipeline("image-text-to-text", model=str(saved), dtype="bfloat16").model) == {torch.bfloat16}


# --- Quantisation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"load_in_4bit": False}, "4 bits", 4], ids=str)
def test_a_quantisation_that_names_no_bits_is_refused(given):
    with pytest.raises(ValueError, match="must be a `BitsAndBytesConfig` or a dictionary"):
        bits_and_bytes_config(given)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_captioner_with_a_trained_language_model_loads_quantised(backbones, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'qformer-captioner[qlora]'")
    parts = backbones / "vision", backbones / "llama"
    model = QFormerCaptioner.from_backbones(*parts, freeze_language_model=False, **tiny.QFORMER)
    with torch.no_grad():
        for weight in model.language_model.parameters():
            weight.mul_(1.2)
    with pytest.raises(ValueError, match=r"from_pretrained\(folder, quantization_config="):
        model.quantize_language_model({bits: True})
    model.save_pretrained(tmp_path / "trained")
    quantized = AutoModel.from_pretrained(tmp_path / "trained", quantization_config={bits: True})
    assert quantized.language_model.is_quantized
    assert (quantized(**BATCH).loss - model.eval()(**BATCH).loss).abs() < 0.5
    for included in (None, False):  # its weights are in no other place
        with pytest.raises(ValueError, match="load the captioner without `quantization_config`"):
            quantized.save_pretrained(tmp_path / "again", include_backbones=included)
    adapted = get_peft_model(quantized, LoraConfig(**LAYERS)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    opened = AutoModel.from_pretrained(tmp_path / "adapter", quantization_config={bits: True})
    torch.testing.assert_close(opened(**BATCH).loss, adapted(**BATCH).loss, atol=1e-2, rtol=1e-2)
