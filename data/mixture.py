"""Several data sets in one."""

import bisect
import itertools
from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from .dataset import CaptionDataset


class CaptionMixture(Dataset):
    """Data sets mixed by weight: the rows of every epoch come from them in these shares.

    An epoch is as long as it takes to show every row of the data set that weighs most for its size once. Of the others
    it shows a part, and the next epoch goes on with the rows behind it.

    Args:
        parts: the data sets.
        weights: of each, above 0.

    Example:

    ```python
    >>> mixture = CaptionMixture([ten_thousand_rows, thousand_rows], [3, 1])
    >>> len(mixture), mixture.counts
    (4000, [3000, 1000])
    ```
    """

    def __init__(self, parts: Sequence[CaptionDataset], weights: Sequence[float]):
        self.parts = parts
        length = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        self.counts = [max(1, round(length * weight)) for weight in weights]
        self.starts = list(itertools.accumulate(self.counts, initial=0))
        generator = torch.Generator().manual_seed(0)
        self.orders = [torch.randperm(len(part), generator=generator) for part in parts]
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # so that data-loading processes see it move on

    def set_epoch(self, epoch: int) -> None:
        """Show the rows that epoch `epoch` shows."""
        self.epoch.fill_(epoch)
        for part in self.parts:
            part.set_epoch(epoch)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: int) -> dict:
        number = bisect.bisect_right(self.starts, position) - 1
        order = self.orders[number]
        row = int(self.epoch) * self.counts[number] + position - self.starts[number]
        return self.parts[number][int(order[row % len(order)])]

    def references(self) -> list[list[str]]:
        """The captions of all rows of all data sets."""
        return [captions for part in self.parts for captions in part.references()]
