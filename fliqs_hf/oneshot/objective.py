"""Rewards, baselines and the policy's loss: pure functions of tensors, free of models, data and devices.

Sources: TuNAS (Bender et al., CVPR 2020) for the absolute reward and the controller; FLIQS (Dotzel et al., 2024) for
the schedule. Williams 1992 for the policy gradient, Kool et al. 2019 for the leave-one-out baseline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absolute_reward(quality: Tensor, cost_ratio: Tensor, beta: float) -> Tensor:
    """r = Q + β·|C/C_target − 1|, with β < 0. Shapes: all [samples].

    Source: TuNAS, equation 4; FLIQS, section 3.
    """
    return quality + beta * (cost_ratio - 1).abs()


def capped_reward(quality: Tensor, cost_ratio: Tensor, beta: float) -> Tensor:
    """r = Q + β·max(0, C/C_target − 1): only what exceeds the target is penalised."""
    return quality + beta * (cost_ratio - 1).clamp(min=0)


def moving_baseline(baseline: Tensor, reward: Tensor, momentum: float, started: Tensor) -> Tensor:
    """Exponential moving average of the mean reward; the first reward starts it. All scalars; `started` is 0 or 1."""
    mean = reward.mean()
    return torch.where(started > 0, momentum * baseline + (1 - momentum) * mean, mean)


def leave_one_out_advantage(reward: Tensor) -> Tensor:
    """Each reward less the mean of the others in its group: an unbiased baseline without an extra forward pass.

    Args:
        reward: [..., n], n ≥ 2, one group per row.
    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    """
    n = reward.shape[-1]
    return (reward - reward.mean(-1, keepdim=True)) * (n / (n - 1))


def entropy_coefficient(step: int, start: int, end: int, maximum: float) -> float:
    """β_H(t): 0 until `start`, then maximum·(1 − cos(π·τ))/2 with τ from 0 at `start` to 1 at `end`.

    Source: FLIQS, section 3. It adds entropy cost late: exploration first, commitment last.
    """
    if step < start or end <= start:
        return 0.0
    progress = min(1.0, (step - start) / (end - start))
    return maximum * (1 - math.cos(math.pi * progress)) / 2


def policy_loss(log_prob: Tensor, advantage: Tensor, entropy: Tensor, entropy_weight: float) -> Tensor:
    """−A·Σ_l log π_l(f_l), averaged over samples, + β_H·mean_l H(π_l).

    Args:
        log_prob: [samples], **summed** over decisions: an average would scale the gradient by 1/D against the reward.
        advantage: [samples], without gradient.
        entropy: scalar, mean over decisions, nats.
    """
    return -(advantage.detach() * log_prob).mean() + entropy_weight * entropy
