"""Callbacks of the Trainer."""

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data_setup import TrainingData


class SetEpochCallback(TrainerCallback):
    """Callback that sets the epoch of the training data, so that its augmentation changes.

    Args:
        train_data: the rows to train on.
    """

    def __init__(self, train_data: TrainingData):
        self.train_data = train_data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Set the epoch before its first row is read, also when a run resumes inside an epoch."""
        self.train_data.set_epoch(int(state.epoch or 0))
