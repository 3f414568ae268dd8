"""Reward functions of the user, from a Python file."""

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import cast

from ..common.errors import InputError, one_line
from .calls import RewardFunction


def load_function(text: str) -> RewardFunction:
    """Return a function from a Python file. The file runs as a module that others cannot import.

    Args:
        text: path of the file and name of the function, `folder/file.py:function`. A relative path starts at the
            working folder.

    Raises:
        InputError: if the file does not exist or raises an error, or if it has no function of that name.
    """
    path, _, name = text.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise InputError(f"There is no file {path!r} with the reward {name!r}: check --reward_funcs.")
    spec = importlib.util.spec_from_file_location(f"_reward_{file.stem}_{abs(hash(file))}", file)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(
            f"The file of rewards {path!r} cannot be run: {type(error).__name__}: {one_line(error, 250)}"
        ) from error
    if name not in vars(module):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise InputError(
            f"{path!r} has no function {name!r}: its functions are {one_line(', '.join(functions) or 'none', 150)}."
        )
    function = vars(module)[name]
    if not callable(function) or inspect.isclass(function):
        raise InputError(
            f"{name!r} in {path!r} is {one_line(repr(function), 100)}, which is not a function: a reward is "
            "`def reward(prompts, completions, **columns)`."
        )
    return cast(RewardFunction, function)
