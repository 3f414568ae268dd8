"""Mixture of several data sets by weight."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

import torch
from torch.utils.data import Dataset

from .dataset import CaptionDataset, CaptionRow


class CaptionMixture(Dataset[CaptionRow]):
    """Data set that mixes several data sets by weight.

    Every epoch contains rows of the data sets in proportion to the weights. Its length is the largest in which no row
    occurs twice, so one of the data sets is used completely. Of the other data sets an epoch contains a part, and the
    next epoch continues after that part.

    Args:
        parts: the data sets.
        weights: weight of each data set, above 0.

    Example:

    ```python
    >>> mixture = CaptionMixture([ten_thousand_rows, thousand_rows], [3, 1])  # doctest: +SKIP
    >>> len(mixture), mixture.counts  # doctest: +SKIP
    (4000, [3000, 1000])
    ```
    """

    def __init__(self, parts: Sequence[CaptionDataset], weights: Sequence[float]):
        self.parts = parts
        length = min(len(part) / weight for part, weight in zip(parts, weights, strict=True))
        self.counts = [max(1, round(length * weight)) for weight in weights]  # rows of each data set in an epoch
        self.starts = list(itertools.accumulate(self.counts, initial=0))
        generator = torch.Generator().manual_seed(0)
        self.orders = [torch.randperm(len(part), generator=generator) for part in parts]
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # shared with the workers of a data loader

    def set_epoch(self, epoch: int) -> None:
        """Select the rows of an epoch."""
        self.epoch.fill_(epoch)
        for part in self.parts:
            part.set_epoch(epoch)

    def keep_columns(self, names: Iterable[str]) -> None:
        """Let each row have the cells of other columns of its data set, as `columns`, if the columns exist."""
        for part in self.parts:
            part.keep_columns(names)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, position: int) -> CaptionRow:
        number = bisect.bisect_right(self.starts, position) - 1
        order = self.orders[number]
        place = int(self.epoch) * self.counts[number] + position - self.starts[number]
        return self.parts[number][int(order[place % len(order)])]

    def references(self) -> list[list[str]]:
        """Return the captions of all rows of all data sets."""
        return [captions for part in self.parts for captions in part.references()]

    def row_prompts(self) -> list[str]:
        """Return the prompts of all rows of all data sets."""
        return [prompt for part in self.parts for prompt in part.row_prompts()]
