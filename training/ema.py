"""Exponential moving average of the weights that train: often a little better than the last ones, and steadier."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

EMA_WEIGHTS_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Keeps the average in step with training; with a checkpoint it is saved, and goes on from it.

    After step t it is `d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`, so that the random
    weights of the beginning are soon forgotten (TensorFlow's and timm's rule).

    Args:
        model: whose parameters that train are averaged.
        decay: how slowly the average follows, between 0 and 1.

    Raises:
        ValueError: for another decay.

    Example:

    ```python
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> average = EMACallback(model, decay=0.999)
    >>> with average.in_place():  # evaluate
    ...     outputs = model(torch.ones(1, 2))
    ```
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"--ema_decay must lie between 0 and 1, not {decay}.")
        self.decay = decay
        self.trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages = {name: weight.detach().clone() for name, weight in self.trained.items()}

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Follow the weights after an optimizer's step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self.trained.items():
            self.averages[name].lerp_(weight.to(self.averages[name]), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and averages."""
        for name, weight in self.trained.items():
            kept = weight.clone()
            weight.copy_(self.averages[name])
            self.averages[name].copy_(kept)

    @torch.no_grad()
    def keep(self) -> None:
        """Leave the averages in the model for good."""
        for name, weight in self.trained.items():
            weight.copy_(self.averages[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the averages in the model for a while."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save(self, folder: str) -> None:
        """Write the averages beside a checkpoint's weights."""
        save_file(
            {name: tensor.contiguous() for name, tensor in self.averages.items()}, Path(folder) / EMA_WEIGHTS_NAME
        )

    def load(self, folder: str) -> None:
        """Take over the averages of a checkpoint; where it has none, begin with its weights."""
        file = Path(folder) / EMA_WEIGHTS_NAME
        saved = load_file(file) if file.is_file() else self.trained
        for name, tensor in self.averages.items():
            tensor.copy_(saved[name].detach())
