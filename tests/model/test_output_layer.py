"""Output layers of language models, tied to the input embedding or not: saved, loaded and trained on.

The yardstick is a stock language model of transformers, which saves every output layer that is not tied in memory.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from qformer_captioner import QFormerCaptioner
from qformer_captioner.weights_qformer import ties_of

from ..fixtures import tiny

LANGUAGES = {
    "llama": dict(name="llama", tie_word_embeddings=True),
    "llama-untied": dict(name="llama", tie_word_embeddings=False),
    "gpt2": dict(name="gpt2"),
    "t5": dict(name="t5"),
    "flan-t5": dict(name="flan-t5"),
    "bart": dict(name="bart"),
}
HEAD = "language_model.lm_head.weight"
BATCH = tiny.batch()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("backbones")
    tiny.save_vision(folder / "vision")
    for name, fields in LANGUAGES.items():
        tiny.save_language(folder / name, **fields)
    return folder


def captioner(backbones: Path, language: str, **options) -> QFormerCaptioner:
    torch.manual_seed(0)
    return QFormerCaptioner.from_backbones(backbones / "vision", backbones / language, **tiny.QFORMER, **options)


def new_layer(model: QFormerCaptioner) -> nn.Linear:
    """Return an output layer with weights of its own."""
    old = model.language_model.get_output_embeddings()
    torch.manual_seed(7)
    return nn.Linear(old.in_features, old.out_features, bias=False)


def replace_layer(model: QFormerCaptioner) -> QFormerCaptioner:
    model.language_model.lm_head = new_layer(model)
    return model


def set_layer(model: QFormerCaptioner) -> QFormerCaptioner:
    model.language_model.set_output_embeddings(new_layer(model))
    return model


def replace_weight(model: QFormerCaptioner) -> QFormerCaptioner:
    model.language_model.lm_head.weight = new_layer(model).weight
    return model


def adapted(model: QFormerCaptioner) -> PeftModel:
    """Return the captioner with adapters and a trained copy of the output layer."""
    layers = LoraConfig(
        r=2, target_modules=r"language_model.*(q_proj|\.q|c_attn)", modules_to_save=["lm_head"], init_lora_weights=False
    )
    model = get_peft_model(model, layers)
    with torch.no_grad():
        model.get_parameter("base_model.model.language_model.lm_head.modules_to_save.default.weight").copy_(
            new_layer(model.get_base_model()).weight
        )
    return model.eval()


def merge_adapter(model: QFormerCaptioner) -> QFormerCaptioner:
    return adapted(model).merge_and_unload()


@pytest.mark.parametrize(
    ("language", "change"),
    [
        *((language, merge_adapter) for language in LANGUAGES),
        *(("llama", change) for change in (replace_layer, set_layer, replace_weight)),
        ("t5", set_layer),
    ],
)
def test_an_output_layer_of_its_own_is_saved(backbones, tmp_path, language, change):
    model = captioner(backbones, language)
    before = model(**BATCH).loss
    model = change(model).eval()
    loss = model(**BATCH).loss
    assert (loss - before).abs() > 0.1
    model.save_pretrained(tmp_path)
    assert HEAD in load_file(tmp_path / "model.safetensors")
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**BATCH).loss, loss)
    loaded.tie_weights()  # which the Trainer, FSDP and `resize_token_embeddings` call
    torch.testing.assert_close(loaded(**BATCH).loss, loss)
    loaded.save_pretrained(tmp_path / "again")
    again = QFormerCaptioner.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(**BATCH).loss, loss)


@pytest.mark.parametrize(("language", "tied"), [("llama", True), ("llama-untied", False), ("gpt2", True)])
@pytest.mark.parametrize("change", [None, replace_layer])
def test_the_saved_configuration_says_whether_the_output_layer_is_tied(backbones, tmp_path, language, tied, change):
    model = captioner(backbones, language)
    if change is not None:
        model = change(model)
    model.save_pretrained(tmp_path, include_backbones=True)
    text_config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text_config["tie_word_embeddings"] == (tied and change is None)
    assert (HEAD in load_file(tmp_path / "model.safetensors")) == (not tied or change is not None)


def test_an_output_layer_that_was_tied_by_hand_is_tied_again(backbones, tmp_path):
    model = captioner(backbones, "llama-untied")
    model.language_model.lm_head.weight = model.language_model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert HEAD not in load_file(tmp_path / "model.safetensors")
    loaded = QFormerCaptioner.from_pretrained(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.get_input_embeddings().weight
    torch.testing.assert_close(loaded(**BATCH).loss, model(**BATCH).loss)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_a_larger_vocabulary_with_its_own_output_layer_is_saved(backbones, tmp_path, language):
    """A layer that is replaced after the vocabulary has grown, and one that grows after it was loaded."""
    model = captioner(backbones, language)
    model.resize_token_embeddings(tiny.WORDS + 3)
    set_layer(model).save_pretrained(tmp_path / "larger")
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "larger")
    torch.testing.assert_close(loaded(**BATCH).loss, model(**BATCH).loss)
    loaded.resize_token_embeddings(tiny.WORDS + 9)
    assert torch.equal(loaded.get_parameter(HEAD)[: tiny.WORDS + 3], model.get_parameter(HEAD))
    loaded.save_pretrained(tmp_path / "largest")
    largest = QFormerCaptioner.from_pretrained(tmp_path / "largest")
    torch.testing.assert_close(largest(**BATCH).loss, loaded(**BATCH).loss)


def test_an_adapter_with_an_output_layer_opens_on_its_captioner(backbones, tmp_path):
    captioner(backbones, "llama").save_pretrained(tmp_path / "base")
    model = adapted(QFormerCaptioner.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    opened = AutoModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(opened(**BATCH).loss, model(**BATCH).loss)


@pytest.mark.parametrize("language", ["llama", "t5"])
def test_checkpoints_of_a_trainer_hold_an_output_layer_that_trained(backbones, tmp_path, language):
    model = replace_layer(captioner(backbones, language))
    options = dict(max_steps=2, save_steps=1, per_device_train_batch_size=3, learning_rate=0.1, disable_tqdm=True)
    rows = [{name: values[number] for name, values in BATCH.items()} for number in range(3)]
    arguments = TrainingArguments(tmp_path, use_cpu=True, **options)
    Trainer(model, arguments, train_dataset=rows).train()
    loaded = QFormerCaptioner.from_pretrained(tmp_path / "checkpoint-2")
    torch.testing.assert_close(loaded(**BATCH).loss, model.eval()(**BATCH).loss)
    resumed = replace_layer(captioner(backbones, language))
    Trainer(resumed, arguments, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    torch.testing.assert_close(resumed.get_parameter(HEAD), model.get_parameter(HEAD))


def test_a_new_bias_of_the_output_layer_counts_as_a_change(backbones):
    """The weights alone are those of the pretrained model, to which the folder could refer."""
    model = captioner(backbones, "llama")
    head = model.language_model.lm_head
    head.bias = nn.Parameter(torch.ones(head.out_features))
    assert "language_model.lm_head.bias" not in model.keys_left_out()


@pytest.mark.parametrize("language", ["llama", "t5", "bart"])
def test_ties_are_those_in_memory(language):
    model = tiny.captioner(language=language).language_model
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert "lm_head.weight" in ties_of(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head.weight" not in ties_of(model)
