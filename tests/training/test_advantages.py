"""Advantages of samples and the clipped objective, against transcriptions of their formulas."""

import pytest
import torch

from qformer_captioner.training.advantages import clipped_weights, leave_one_out


def test_the_baseline_is_the_mean_of_the_other_samples():
    rewards = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    for image in range(4):
        for sample in range(5):
            others = [rewards[image, other] for other in range(5) if other != sample]
            expected = rewards[image, sample] - sum(others) / 4
            assert leave_one_out(rewards)[image, sample] == pytest.approx(expected.item(), abs=1e-6)


def test_equal_rewards_have_advantages_of_exactly_zero():
    assert not leave_one_out(torch.tensor([[0.1] * 7, [1e8 / 3] * 7])).any()


def test_the_weights_are_the_gradient_of_the_clipped_objective():
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 0.0]])
    log_ratios = torch.tensor([[-1.0, 0.1, 1.0, -1.0, 0.1, 1.0, 1.0]], requires_grad=True)
    ratios = log_ratios.exp()
    objective = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
    (expected,) = torch.autograd.grad(objective.sum(), log_ratios)
    weights = clipped_weights(advantages, log_ratios.detach(), 0.2)
    torch.testing.assert_close(weights, expected)
    assert weights[0, 2] == 0 and weights[0, 3] == 0 and weights[0, 0] > 0 and weights[0, 5] < 0
