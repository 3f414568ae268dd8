"""Exponential moving average (EMA) of the trainable weights, which often scores slightly better than they do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EMA_WEIGHTS_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Callback that updates an exponential moving average of the trainable weights after each optimizer step.

    After step `t` the average is `d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`. In the
    first steps `d` is smaller, so the average forgets the random initial weights quickly. TensorFlow's
    `tf.train.ExponentialMovingAverage` and timm's `ModelEmaV3` use the same warm-up.

    Args:
        model: the model whose trainable parameters are averaged.
        decay: decay of the average, above 0 and below 1.

    Raises:
        ValueError: if the decay is not between 0 and 1.

    Example:

    ```python
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> ema = EMACallback(model, decay=0.999)
    >>> with ema.averaged_weights():  # evaluate
    ...     outputs = model(torch.ones(1, 2))
    ```
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"--ema_decay must lie between 0 and 1, not {decay}.")
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the averages after an optimizer step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self.weights.items():
            self.averages[name].lerp_(weight.to(self.averages[name]), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights of the model and the averages."""
        for name, weight in self.weights.items():
            previous = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(previous)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the weights of the model with the averages permanently, at the end of training."""
        for name, weight in self.weights.items():
            weight.copy_(self.averages[name])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averages as weights of the model inside a `with` block, and restore the weights after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save(self, folder: str | os.PathLike) -> None:
        """Write the averages next to the weights of a checkpoint."""
        averages = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(averages, Path(folder) / EMA_WEIGHTS_NAME)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Read the averages of a checkpoint. Without saved averages, they start from the weights of the checkpoint."""
        file = Path(folder) / EMA_WEIGHTS_NAME
        saved = load_file(file) if file.is_file() else self.weights
        for name, average in self.averages.items():
            average.copy_(saved[name])
