"""Advantages of sampled captions, and the weights of their log-probabilities in the gradient.

Shapes: B images, K captions of an image.
"""

import torch


def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """Return each reward minus the mean reward of the other captions of its image (Kool et al. 2019; Luo 2020).

    Equal rewards give exactly 0.

    Args:
        rewards (`[B, K]`, float32): rewards of at least two captions of each image.

    Example:

    ```python
    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist()
    [[-3.0, -1.5, 4.5]]
    ```
    """
    return (rewards[:, :, None] - rewards[:, None, :]).sum(dim=2) / (rewards.shape[1] - 1)


def clipped_weights(advantages: torch.Tensor, log_ratios: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the weights with which log-probabilities have the gradient of PPO's clipped objective.

    The objective is `min(ratio * advantage, clip(ratio, 1 - epsilon, 1 + epsilon) * advantage)`, as in trl's
    `RLOOTrainer` (Schulman et al. 2017, equation 7), with one ratio for each caption. The gradient is 0 where it is
    clipped, and otherwise that of the log-probability times `ratio * advantage`.

    Args:
        advantages (`[B, K]`): the advantages.
        log_ratios (`[B, K]`): log-probability of each caption now, minus that at the time of sampling.
        epsilon: the ratio is clipped to `1 - epsilon` and `1 + epsilon`.
    """
    ratios = log_ratios.exp()
    is_clipped = torch.where(advantages > 0, ratios > 1 + epsilon, ratios < 1 - epsilon)
    return (ratios * advantages).masked_fill(is_clipped, 0)
