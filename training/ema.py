"""Exponential moving average (EMA) of the trainable weights, which often scores slightly better than they do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EMA_WEIGHTS_NAME = "ema.safetensors"


class EMACallback(TrainerCallback):
    """Callback that updates an exponential moving average of the trainable weights after each optimizer step.

    After step `t` the average is `d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`. In the
    first steps `d` is smaller, so the average forgets the random initial weights quickly. TensorFlow's
    `tf.train.ExponentialMovingAverage` and timm's `ModelEmaV3` use the same warm-up.

    Averages are float32. With FSDP, each process averages its own shards.

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
        self.model = model
        self.decay = decay
        self.averages = {name: weight.float().clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Return the trainable weights by name, or with FSDP this process's shards of them.

        FSDP replaces the parameters of the model when training starts, so they are looked up again in each call.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # gathered parameters are copies, which would not see a change of the shards
        return {name: local(weight) for name, weight in self.model.named_parameters() if weight.requires_grad}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the averages of a new run from the weights, which FSDP may have sharded."""
        if state.global_step == 0:
            self.averages = {name: weight.float().clone() for name, weight in self.weights().items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Update the averages after an optimizer step."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, weight in self.weights().items():
            self.averages[name] = self.averages[name].to(weight.device).lerp_(weight.float(), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights of the model and the averages."""
        for name, weight in self.weights().items():
            previous = weight.float().clone()
            weight.copy_(self.averages[name])
            self.averages[name] = previous

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Replace the weights of the model with the averages permanently, at the end of training."""
        for name, weight in self.weights().items():
            weight.copy_(self.averages[name])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Use the averages as weights of the model inside a `with` block, and restore the weights after it."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def save(self, folder: str | os.PathLike, is_main_process: bool = True) -> None:
        """Write the averages next to the weights of a checkpoint.

        Args:
            folder: the checkpoint.
            is_main_process: whether this process writes the file. With FSDP, all processes must call this method.
        """
        weights = dict(self.model.named_parameters())
        averages = {name: gathered(average, weights[name]) for name, average in self.averages.items()}
        if is_main_process:
            save_file(averages, Path(folder) / EMA_WEIGHTS_NAME)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Read the averages of a checkpoint. Without saved averages, they start from the weights of the checkpoint."""
        file = Path(folder) / EMA_WEIGHTS_NAME
        current = self.weights()
        if not file.is_file():
            self.averages = {name: weight.float().clone() for name, weight in current.items()}
            return
        weights = dict(self.model.named_parameters())
        saved = load_file(file)
        self.averages = {name: sharded(saved[name].float(), weights[name]).to(current[name].device) for name in current}


def local(weight: torch.Tensor) -> torch.Tensor:
    """Return the part of a weight that this process holds, which shares its memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def gathered(part: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor whose parts are distributed among the processes as those of a weight."""
    if not isinstance(weight, DTensor):
        return part.contiguous()
    whole = DTensor.from_local(
        part, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride(), run_check=False
    )
    return whole.full_tensor().contiguous()


def sharded(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that is distributed as a weight."""
    if not isinstance(weight, DTensor):
        return whole
    return distribute_tensor(whole.to(weight.device), weight.device_mesh, weight.placements).to_local()
