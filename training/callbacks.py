"""TODO."""

from transformers import TrainerCallback

from ..data.dataset import CaptionDataset


class SetEpochCallback(TrainerCallback):
    """Tells the training data which epoch it is, so that rows vary."""

    def __init__(self, rows: CaptionDataset):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Before the first row of an epoch, also of one that a killed run is in the middle of."""
        self.rows.set_epoch(int(state.epoch))
