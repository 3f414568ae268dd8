"""Calls of reward functions, checks of what they return, and their weighted sum."""

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..common.errors import InputError, one_line

RewardFunction = Callable[..., Sequence[float | None]]

MAX_REWARD = torch.finfo(torch.float32).max


@dataclass
class RewardScores:
    """Rewards of n completions.

    Args:
        total: weighted sum of all rewards, float32 `[n]`.
        by_name: the rewards of each function before they are weighted, float32 `[n]`. NaN marks a completion for which
            the function returned `None`, because it does not apply.
    """

    total: torch.Tensor
    by_name: dict[str, torch.Tensor]


class Rewards:
    """Reward functions and their weights.

    Functions have the signature of trl's, `reward(prompts, completions, **columns) -> list[float]`, and all arguments
    are keywords. Prompts and completions are strings, as in trl's standard format. `None` in place of a number means
    that the function does not apply to this completion. The weighted sum then leaves it out, as in trl.

    A function without `**columns` gets the columns that its signature names.

    Args:
        functions: the functions, by name.
        weights: weight of each function in the sum.
        device: device of the results.

    Example:

    ```python
    >>> from qformer_captioner.rewards import Rewards
    >>> def short(completions, **columns):
    ...     return [-len(completion.split()) for completion in completions]
    >>> scores = Rewards({"short": short}, [0.5])(["", ""], ["a dog", "a dog runs"])
    >>> scores.total.tolist(), scores.by_name["short"].tolist()
    ([-1.0, -1.5], [-2.0, -3.0])
    ```
    """

    def __init__(
        self, functions: dict[str, RewardFunction], weights: Sequence[float], device: torch.device | str = "cpu"
    ):
        self.functions = functions
        self.weights = torch.tensor(weights, dtype=torch.float32, device=device)
        self.device = torch.device(device)

    @property
    def columns(self) -> frozenset[str]:
        """Names of the columns that the signatures of the functions name, such as "references" or "image"."""
        names = {
            parameter.name
            for function in self.functions.values()
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        return frozenset(names - {"prompts", "completions"})

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> RewardScores:
        """Score completions.

        Args:
            prompts: the text prompt of each completion.
            completions: n captions.
            columns: further columns, each with one entry for each completion. `references` holds the captions of the
                image. `completion_ids` holds the tokens of the completion, with the end token if it was generated.
                `image` holds the PIL image, or `image_embeds` its features (`[N, Dv]`). Samples of one image should
                share one object, because an image is then encoded once. The others are those of the data set.

        Raises:
            InputError: if a function needs a column that is missing, raises an error, or returns anything other than
                one finite number or `None` for each completion. The message names the function.
            ValueError: if a column has another number of entries.
        """
        arguments = {"prompts": prompts, "completions": completions, **columns}
        if odd := [name for name, values in arguments.items() if len(values) != len(completions)]:
            raise ValueError(
                f"There are {len(completions)} completions but {len(arguments[odd[0]])} entries of {odd[0]!r}."
            )
        by_name = {
            name: torch.tensor(
                call(name, function, arguments, len(completions)), dtype=torch.float32, device=self.device
            )
            for name, function in self.functions.items()
        }
        total = (torch.stack(list(by_name.values())).nan_to_num(nan=0.0) * self.weights[:, None]).sum(dim=0)
        return RewardScores(total, by_name)


def call(name: str, function: RewardFunction, arguments: dict[str, Any], number: int) -> list[float]:
    """Return the rewards of a function, NaN where it returned `None`.

    Args:
        name: name of the function, for messages.
        function: the function.
        arguments: prompts, completions and all columns.
        number: number of completions.

    Raises:
        InputError: as [`Rewards`] does.
    """
    parameters = inspect.signature(function).parameters.values()
    named = {parameter.name: parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    for parameter in named.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            present = ", ".join(sorted(arguments.keys() - {"prompts", "completions"})) or "no columns"
            raise InputError(
                f"The reward {name!r} needs the column {parameter.name!r}, which this run lacks. The run has "
                f"{one_line(present, 150)}."
            )
    if len(named) == len(parameters):
        arguments = {key: values for key, values in arguments.items() if key in named}
    try:
        values = function(**arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"The reward {name!r} raised {type(error).__name__}{_line_of(error, function)}, so correct it "
            f"({one_line(error, 250)})."
        ) from error
    return checked_values(name, values, number)


def checked_values(name: str, values: Any, number: int) -> list[float]:
    """Return what a reward function returned as floats, NaN for `None`.

    Args:
        name: name of the function, for messages.
        values: the values: a list, a tuple, an array or a tensor.
        number: number of completions.

    Raises:
        InputError: unless there is a finite number or `None` for each completion.
    """
    try:
        values = [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
    except TypeError as error:
        raise InputError(
            f"The reward {name!r} returned {one_line(repr(values), 100)}, which is not a list: it must return one "
            "number for each completion."
        ) from error
    if len(values) != number:
        raise InputError(
            f"The reward {name!r} returned {len(values)} values for {number} completions: it must return one number "
            "for each completion."
        )
    for index, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, numbers.Real) or not abs(float(value)) <= MAX_REWARD:  # NaN is never below
            raise InputError(
                f"The reward {name!r} returned {one_line(repr(value), 100)} for completion {index}: it must return a "
                "finite number, or None if it does not apply."
            )
    return [math.nan if value is None else float(value) for value in values]


def _line_of(error: Exception, function: RewardFunction) -> str:
    """Return the place in the user's file that an error comes from, for a message, or nothing for other functions."""
    if not inspect.isfunction(function):
        return ""
    file = function.__code__.co_filename
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]}" if lines else ""
