"""Reward for captions of a given length."""

from typing import Any


class LengthReward:
    """Reward that is 0 for captions of a given number of words, and negative for all others.

    It is `-|words - target| / target`: -1 for an empty caption and for one of twice the length. Words are separated by
    spaces.

    Args:
        target: number of words.

    Example:

    ```python
    >>> from qformer_captioner.rewards.lengths import LengthReward
    >>> LengthReward(4)(["", ""], ["a dog runs fast", "a dog runs"])
    [0.0, -0.25]
    ```
    """

    def __init__(self, target: int):
        self.target = target

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Return the reward of each completion; the other arguments are not read."""
        return [-abs(len(completion.split()) - self.target) / self.target for completion in completions]
