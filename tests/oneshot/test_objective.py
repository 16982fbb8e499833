"""Rewards, baselines and the policy's loss against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fliqs_hf.oneshot.objective import (
    absolute_reward,
    capped_reward,
    entropy_coefficient,
    leave_one_out_advantage,
    moving_baseline,
    policy_loss,
)

# Every number below is a sum of powers of two, so float32 results are exact unless a test says otherwise.


def test_the_absolute_reward_penalises_both_sides_alike() -> None:
    reward = absolute_reward(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.75, 1.0, 1.25]), beta=-0.5)
    assert reward.tolist() == [0.375, 0.5, 0.375]


def test_the_capped_reward_penalises_only_excess() -> None:
    reward = capped_reward(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.75, 1.0, 1.25]), beta=-0.5)
    assert reward.tolist() == [0.5, 0.5, 0.375]


def test_the_moving_baseline_starts_at_the_first_reward() -> None:
    baseline, started = torch.tensor(99.0), torch.tensor(0.0)
    baseline = moving_baseline(baseline, torch.tensor([1.0, 3.0]), 0.75, started)
    assert baseline.item() == 2.0
    baseline = moving_baseline(baseline, torch.tensor([6.0]), 0.75, torch.tensor(1.0))
    assert baseline.item() == 0.75 * 2 + 0.25 * 6


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    reward = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    expected = torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3 - 0.0]])
    torch.testing.assert_close(leave_one_out_advantage(reward), expected)  # 1/3 is rounded
    torch.testing.assert_close(leave_one_out_advantage(reward[0]), expected[0])
    torch.testing.assert_close(leave_one_out_advantage(reward.expand(4, *reward.shape))[3], expected)


def test_the_entropy_coefficient_is_a_cosine_from_start_to_end() -> None:
    values = [entropy_coefficient(step, 25, 105, 0.5) for step in (0, 24, 25, 45, 65, 85, 105, 200)]
    quarter = (1 - math.cos(math.pi / 4)) / 2
    assert values == pytest.approx([0, 0, 0, 0.5 * quarter, 0.25, 0.5 * (1 - quarter), 0.5, 0.5], abs=1e-15)
    assert entropy_coefficient(3, 5, 5, 0.5) == 0  # no search phase


def test_the_policy_loss_has_the_gradient_of_reinforce() -> None:
    """−A·∇ log π of a softmax is A·(π − one-hot), and ∇H = −π·(log π + H); averaged over samples, H over decisions."""
    logits = torch.tensor([[0.3, -1.0, 0.2], [1.0, 0.0, -0.5]], dtype=torch.float64, requires_grad=True)
    choice, advantage, weight = torch.tensor([[0, 2], [1, 1], [2, 0]]), torch.tensor([2.0, -1.0, 0.5]).double(), 0.7
    log_p = torch.log_softmax(logits, -1)
    log_prob = log_p[torch.arange(2), choice].sum(-1)
    entropy_of = -(log_p.exp() * log_p).sum(-1)
    policy_loss(log_prob, advantage, entropy_of.mean(), weight).backward()

    p = torch.softmax(logits.detach(), -1)
    expected = torch.zeros_like(p)
    for a, sample in zip(advantage, choice, strict=True):
        expected += a * (p - torch.nn.functional.one_hot(sample, 3)) / 3
    expected += weight / 2 * -p * (p.log() + entropy_of.detach()[:, None])
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)  # float64, different order of operations


def test_no_gradient_reaches_the_reward() -> None:
    advantage = torch.tensor([1.0], requires_grad=True)
    log_prob: Tensor = torch.tensor([-1.0], requires_grad=True)
    policy_loss(log_prob, advantage, torch.tensor(0.0), 0.0).backward()
    assert advantage.grad is None
    assert log_prob.grad is not None
    assert log_prob.grad.item() == -1.0
