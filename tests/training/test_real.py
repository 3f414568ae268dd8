"""A run on real photographs with a real vision encoder and a real tokenizer, where they are available."""

import json

import pytest
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from qformer_captioner import QFormerCaptioner, train_hf

from ..fixtures.processes import command_line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(shared, tmp_path_factory):
    """Train a few steps between two frozen backbones: DINOv2-small and a small GPT-2 with random weights."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2)).save_pretrained(folder / "gpt2")
    options = {
        "dataset_name": shared / "data" / "flickr8k",
        "caption_column": "captions",
        "vision_model_name_or_path": shared / "models" / "dinov2-small",
        "language_model_name_or_path": folder / "gpt2",
        "qformer_config": '{"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4}',
        "prompt": "A photo of",
        "max_train_samples": 16,
        "max_eval_samples": 4,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "generation_max_length": 8,
        "output_dir": folder / "run",
        "disable_tqdm": "true",
    }
    train_hf.train(command_line(**options))
    return folder / "run"


def test_the_split_column_of_the_data_set_is_used(run):
    captions = [json.loads(line) for line in (run / "captions.jsonl").read_text().splitlines()]
    assert [len(row["references"]) for row in captions] == [5] * 4


def test_checkpoints_hold_trainable_weights_only(run):
    checkpoint = next(run.glob("checkpoint-*")) / "model.safetensors"
    trained = QFormerCaptioner.from_pretrained(run).num_parameters(only_trainable=True)
    assert checkpoint.stat().st_size < 4 * trained + 20_000


def test_the_final_folder_stores_backbones_that_came_from_folders(run):
    config = json.loads((run / "config.json").read_text())
    assert config["referenced_backbones"] == []
    assert config["freeze_vision_model"] and config["freeze_language_model"]


def test_a_photograph_is_captioned(run, shared):
    photograph = next((shared / "data" / "flickr8k" / "images").glob("*.jpg"))
    assert isinstance(QFormerCaptioner.from_pretrained(run).caption(photograph, max_new_tokens=4), str)
