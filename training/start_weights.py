"""Copy of the weights that a run starts from, the reference of the KL divergence."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class StartWeights:
    """Copy of the trainable weights of a model. Frozen weights do not change and are not copied.

    Args:
        model: the model. Create the copy before a checkpoint is loaded.

    Example:

    ```python
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> start = StartWeights(model)
    >>> _ = model.weight.data.zero_()
    >>> with start.in_model():
    ...     bool(model.weight.any())
    True
    ```
    """

    def __init__(self, model: nn.Module):
        self.model = model
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Use the copy as weights of the model inside a `with` block, and restore the weights after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self.model.named_parameters():
            if name in self.weights:
                weight.data, self.weights[name] = self.weights[name].to(weight.device), weight.data
