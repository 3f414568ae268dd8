"""Callbacks of the Trainer."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data_setup import TrainingData


class SetEpochCallback(TrainerCallback):
    """Callback that tells the training data which epoch begins, so that its random variation changes.

    Args:
        train_data: the rows to train on.
    """

    def __init__(self, train_data: TrainingData):
        self.train_data = train_data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the epoch before its first row, also of an epoch that a resumed run continues."""
        self.train_data.set_epoch(int(state.epoch or 0))
