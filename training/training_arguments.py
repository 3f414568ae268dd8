"""Training arguments with the options and defaults of this package."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Seq2SeqTrainingArguments

from ..common.arguments import option
from .arguments import TrainingOptions


@dataclass
class QFormerTrainingArguments(TrainingOptions, Seq2SeqTrainingArguments):  # type: ignore[misc]
    """Arguments of [`QFormerTrainer`]: all of transformers' `Seq2SeqTrainingArguments` and [`TrainingOptions`].

    `bf16=None` becomes `True` on GPUs that support bfloat16, unless `fp16` or `use_cpu` is set. With
    `metric_for_best_model=None`, the trainer chooses the score that selects the best checkpoint.

    Example:

    ```python
    >>> QFormerTrainingArguments(output_dir="outputs/mine", use_cpu=True, ema_decay=0.999).learning_rate
    0.0001
    ```
    """

    remove_unused_columns: bool = option(
        False,
        "Remove columns that are not arguments of `forward`, among them the images.",
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            has_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = has_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        chosen = self.metric_for_best_model, self.greater_is_better
        super().__post_init__()
        if chosen[0] is None:  # the Trainer's choice is the loss, that of `QFormerTrainer` depends on the objective
            self.metric_for_best_model, self.greater_is_better = chosen
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()

    @property
    def output_folder(self) -> Path:
        """Return the output folder, or the default of the Trainer."""
        return Path(self.output_dir or "trainer_output")

    @property
    def best_score_name(self) -> str:
        """Return the name of the score that selects the best checkpoint, without the prefix `eval_`."""
        return (self.metric_for_best_model or "loss").removeprefix("eval_")
