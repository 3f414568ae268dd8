"""Rewards of captions for reward fine-tuning, with the signature of trl's reward functions.

Names that import torch are imported on first use, because that takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .endings import bad_ending

if TYPE_CHECKING:
    from .calls import Rewards, RewardScores
    from .loading import RewardContext, load_rewards

__all__ = ["RewardContext", "RewardScores", "Rewards", "bad_ending", "load_rewards"]

_MODULES = {
    "RewardContext": "loading",
    "RewardScores": "calls",
    "Rewards": "calls",
    "load_rewards": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
