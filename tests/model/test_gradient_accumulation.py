"""Gradient accumulation with transformers' own Trainer."""

import pathlib

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from ..fixtures import tiny


class Captions(Dataset):
    """Data set of eight images with captions of 1 to 8 tokens."""

    def __init__(self):
        self.batch = tiny.batch(prompts=[2] * 8, captions=range(1, 9))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: tensor[index] for name, tensor in self.batch.items()}


def train(model: nn.Module, folder: pathlib.Path, batch_size: int, accumulation: int) -> list[float]:
    """Run two steps of SGD, each on all eight images, and return the logged losses."""
    options = dict(learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd", num_train_epochs=2)
    options |= dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    options |= dict(logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(
        model, TrainingArguments(folder, remove_unused_columns=False, **options), train_dataset=Captions()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["bart", "llama"])
def test_gradient_accumulation_is_a_larger_batch(language, tmp_path):
    """Captions have unequal lengths: a mean of means would give tokens of short captions more weight."""
    whole, parts = tiny.captioner("clip", language), tiny.captioner("clip", language)
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    first_loss = whole(**Captions().batch).loss.item()
    losses = [train(whole, tmp_path, 8, 1), train(parts, tmp_path, 2, 4)]
    assert losses[0][0] == pytest.approx(first_loss, abs=1e-4)
    assert losses[0][1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)  # they are logged with four digits
    for name, tensor in parts.state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name], rtol=0, atol=1e-6, msg=name)
    moved = max((tensor - start[name]).abs().max() for name, tensor in whole.state_dict().items())
    assert moved > 1e-4
