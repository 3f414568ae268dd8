"""Adapters of PEFT beside and on captioners: kinds that transformers loads, shared folders, and quantised models."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, BitsAndBytesConfig

from qformer_captioner import QFormerCaptioner
from qformer_captioner.common.errors import InputError
from qformer_captioner.hub.load import load_captioner
from qformer_captioner.weights_qformer import replaced_weights

from ..fixtures import tiny

BATCH = tiny.batch()
LAYERS = dict(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)


def loss_of(model: torch.nn.Module) -> float:
    return model.eval()(**BATCH).loss.item()


@pytest.fixture(params=[False, True], ids=["by reference", "self-contained"])
def base(request, backbones, tmp_path) -> QFormerCaptioner:
    torch.manual_seed(0)
    model = QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER)
    model.save_pretrained(tmp_path / "base", include_backbones=request.param)
    return QFormerCaptioner.from_pretrained(tmp_path / "base")


def test_auto_model_opens_dora_with_its_magnitudes(base, tmp_path):
    adapted = get_peft_model(base, LoraConfig(**LAYERS, use_dora=True, modules_to_save=["language_projection"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "magnitude" in name:
                weight.mul_(2)
    adapted.save_pretrained(tmp_path / "adapter")
    assert loss_of(AutoModel.from_pretrained(tmp_path / "adapter")) == pytest.approx(loss_of(adapted), abs=1e-5)


def test_a_merged_captioner_takes_the_place_of_its_adapter(base, tmp_path):
    adapted = get_peft_model(base, LoraConfig(**LAYERS))
    adapted.save_pretrained(tmp_path / "adapter")
    expected = loss_of(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "adapter")
    assert loss_of(AutoModel.from_pretrained(tmp_path / "adapter")) == pytest.approx(expected, abs=1e-4)
    aside = PeftModel.from_pretrained(
        QFormerCaptioner.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter" / "earlier_adapter")
    )
    assert loss_of(aside) == pytest.approx(expected, abs=1e-4)  # nothing was lost


def test_an_adapter_may_be_in_the_folder_of_its_captioner(base, tmp_path):
    base.add_adapter(LoraConfig(**LAYERS))
    base.save_pretrained(tmp_path / "base")
    for auto_class in (AutoModel, QFormerCaptioner):
        assert loss_of(auto_class.from_pretrained(tmp_path / "base")) == loss_of(base)


def test_an_upload_of_a_captioner_replaces_an_adapter_in_its_repository():
    existing = ["adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors"]
    assert sorted(replaced_weights({"model.safetensors"}, existing)) == existing[:2]
    assert replaced_weights({"adapter_config.json", "adapter_model.safetensors"}, existing) == []


def test_an_adapter_without_a_captioner_is_named_on_the_command_line(base, tmp_path):
    get_peft_model(base, LoraConfig(**LAYERS)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(InputError, match=r"names no captioner; write .* as `base_model_name_or_path`"):
        load_captioner(str(tmp_path / "adapter"))


@pytest.mark.parametrize("option", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_with_a_merged_adapter_are_not_kept_by_reference(backbones, tmp_path, option):
    pytest.importorskip("bitsandbytes")
    model = QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER)
    model.quantize_language_model(BitsAndBytesConfig(**{option: True}))
    loss_of(model)
    model.save_pretrained(tmp_path / "before")
    merged = get_peft_model(model, LoraConfig(**LAYERS)).merge_and_unload()
    with pytest.raises(ValueError, match=r"rounded weights.*merge adapters into it there"):
        merged.save_pretrained(tmp_path / "after")


def test_adapters_that_were_added_to_a_quantised_captioner_are_saved(backbones, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = QFormerCaptioner.from_backbones(backbones / "vision", backbones / "llama", **tiny.QFORMER)
    model.save_pretrained(tmp_path / "base")
    bits = BitsAndBytesConfig(load_in_4bit=True)
    model.quantize_language_model(bits)
    model.add_adapter(LoraConfig(**LAYERS))
    model.save_pretrained(tmp_path / "adapter")
    assert loss_of(AutoModel.from_pretrained(tmp_path / "adapter", quantization_config=bits)) == loss_of(model)
