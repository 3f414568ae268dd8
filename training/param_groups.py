"""Learning rates of the parts of a captioner."""

from collections.abc import Mapping

import torch
from torch import nn


def set_learning_rates(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[str, float | None]) -> None:
    """Move the parameters of parts that have their own learning rate to new parameter groups.

    The other settings of a group, such as its weight decay, do not change.

    Args:
        optimizer: the optimizer, changed in place.
        model: the model whose parameters it updates.
        rates: learning rate by name of the part, for example `{"language_projection": 4e-3}`. `None` changes nothing.

    Example:

    ```python
    >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    >>> set_learning_rates(optimizer, model, {"head": 1e-2})
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.0001, 0.01]
    ```
    """
    names = {parameter: name.split(".") for name, parameter in model.named_parameters()}
    for part, rate in rates.items():
        if rate is None:
            continue
        for group in list(optimizer.param_groups):
            selected = [parameter for parameter in group["params"] if part in names[parameter]]
            if selected:
                group["params"] = [parameter for parameter in group["params"] if part not in names[parameter]]
                optimizer.add_param_group({**group, "params": selected, "lr": rate})
