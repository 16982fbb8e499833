"""The one-shot search: what happens to the policy before and after each training step.

The training loop asks `begin_step` for formats and gives `end_step` the quality it measured; nothing else passes
between them. Nothing here waits for the device during a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.oneshot.config import SearchConfig
from fliqs_hf.oneshot.objective import (
    absolute_reward,
    capped_reward,
    entropy_coefficient,
    leave_one_out_advantage,
    moving_baseline,
    policy_loss,
)
from fliqs_hf.oneshot.policy import step_generator
from fliqs_hf.oneshot.policy_search import FinalChoice, Gather, PolicySearch
from fliqs_hf.selection import SearchProblem, find_score


class OneShotSearch(PolicySearch):
    """Policy, optimizer and phases of one search.

    All ranks hold the same policy: each samples for itself from a generator of (seed, step, rank), and every rank
    replays the samples of all others and applies the one update that the gathered qualities give.

    Attributes:
        phase: "warmup" (uniform sampling), "search" or "final" (one fixed allocation).
    """

    def __init__(
        self,
        problem: SearchProblem,
        config: SearchConfig,
        total_steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        gather: Gather | None = None,
    ) -> None:
        """
        Args:
            total_steps: optimizer steps of the whole run, both phases.
            gather: [n] of every rank -> [world_size · n] on every rank, in the order of ranks.
        Raises: TargetError: the target is outside the range of the space, or in a gap of it. This is found out here
            and not when the allocation is derived, hours later. ConfigError: a problem without a target, or a prior
            that does not score the space.
        """
        if config.prior != "none":
            find_score(config.prior).check(problem.space)
        super().__init__(
            problem, config.policy_learning_rate, seed=seed, rank=rank, world_size=world_size, device=device,
            gather=gather,
        )  # fmt: skip
        self.config = config
        self.search_start = round(config.warmup_fraction * total_steps)
        self.search_end = round(config.explore_fraction * total_steps)
        self.baseline = torch.zeros((), device=device)
        self.started = torch.zeros((), device=device)
        self._final_formats: list[tuple[Tensor, Tensor]] = []
        self._choices = torch.empty(0, dtype=torch.long)
        self._metrics: dict[str, Tensor] = {}
        self._program()

    def start_from(self, scores: Tensor) -> None:
        """Set the prior: logits = −κ·(score − least score of the decision), tilted to the target's expected cost.

        κ is `prior_strength`, or such that the tilted policy has the mean entropy `prior_entropy`, by bisection.

        Args:
            scores: [D, K], expected increase of the loss.
        Raises: ConfigError: scores that are not finite, or not of this space.
        """
        if scores.shape != self.policy.logits.shape or not scores.isfinite().all():
            raise ConfigError(
                f"the prior needs finite scores {list(self.policy.logits.shape)}, not {list(scores.shape)} with "
                f"{int((~scores.isfinite()).sum())} that are not finite"
            )
        relative = scores - scores.amin(-1, keepdim=True)
        if self.config.prior_strength is not None:
            self._set_prior(relative, self.config.prior_strength)
            return
        low, high = 0.0, 60.0  # log2 of κ times the largest score
        largest = max(float(relative.max()), 1e-30)
        for _ in range(24):
            middle = (low + high) / 2
            if self._set_prior(relative, 2**middle / largest) > self.config.prior_entropy:
                low = middle
            else:
                high = middle

    @torch.no_grad()
    def _set_prior(self, relative: Tensor, strength: float) -> float:
        """Returns: the mean entropy of the policy, nats."""
        self.policy.logits.copy_((-strength * relative).to(self.policy.logits))
        self.policy.match_expected_cost(self.problem.target_cost)
        return float(self.policy.entropy())

    def phase(self, step: int) -> str:
        if step >= self.search_end:
            return "final"
        return "search" if step >= self.search_start else "warmup"

    @property
    def samples_per_step(self) -> int:
        """Forward passes that `begin_step` wants in the search phase."""
        return self.config.samples_per_step

    def begin_step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Formats for step `step`: one (weight indices [L], activation indices [L]) per forward pass of this rank."""
        phase = self.phase(step)
        if phase == "final":
            if not self._final_formats:
                choice = self.problem.space.choice(self.finalize().allocation).to(self.device)
                self._final_formats = [self.problem.space.indices(choice)]
            return self._final_formats
        everyone = [self._sample(step, rank, phase) for rank in range(self.world_size)]
        self._choices = torch.cat(everyone)
        return [self.problem.space.indices(choice) for choice in everyone[self.rank]]

    def end_step(self, step: int, quality: Tensor) -> None:
        """Learn from step `step`.

        Args:
            quality: [samples_per_step] of this rank, higher is better, on the device, in the order of `begin_step`.
        """
        phase = self.phase(step)
        if phase == "final":
            return
        quality = self.gather(quality.detach().float())
        ratio = (self.problem.cost(self._choices) / self.problem.target_cost).float()
        reward = self._reward(quality, ratio)
        if self.problem.limits and self.config.reward != "quality":
            reward = reward + self.config.beta * self.problem.excess(self._choices).float()
        advantage = self._advantage(reward)
        self.baseline = moving_baseline(self.baseline, reward, self.config.baseline_momentum, self.started)
        self.started = torch.ones_like(self.started)
        entropy = self.policy.entropy()
        if phase == "search":
            weight = entropy_coefficient(step, self.search_start, self.search_end, self.config.entropy_weight)
            loss = policy_loss(self.policy.log_prob(self._choices), advantage, entropy, weight)
            if self.config.cost_weight:
                excess = self.policy.expected_cost() / self.problem.target_cost - 1
                if self.problem.limits and self.problem.aim.cap:  # which of the costs is used up is not known
                    excess = excess.clamp(min=0)
                miss = excess.square()
                if self.problem.limits:
                    miss = miss + self.problem.expected_excess(self.policy.log_probabilities.exp())
                loss = loss + self.config.cost_weight * miss.float()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self._metrics = {"reward": reward.mean(), "cost_ratio": ratio.mean(), "entropy": entropy.detach()}

    def metrics(self) -> dict[str, Tensor]:
        """Scalars of the last step, on the device."""
        return dict(self._metrics)

    def probabilities(self) -> Tensor:
        """[D, K]."""
        return self.policy.log_probabilities.detach().exp()

    def finalize(self) -> FinalChoice:
        """Derive the final allocation from the policy as it stands.

        The result meets the target: within 2 % where it is two-sided (below it, by the band), never above a cap.
        """
        if self.final is not None:
            return self.final
        argmax = self.policy.argmax().cpu()
        argmax_cost = float(self.problem.cost(argmax))
        keep = self.config.derive == "argmax" and self.problem.aim.is_met(argmax_cost, self.problem.target_cost)
        keep = keep and self.problem.keeps_limits(argmax)
        choice = argmax if keep else self._program()
        return self.end_with(choice)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, for safetensors. The final allocation is stored as its choice."""
        return self.stored(self.policy.state_dict() | {"baseline": self.baseline, "started": self.started})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue bit for bit where `state_dict` was taken.

        Raises: CheckpointError: a state of another search space, or with parts missing.
        """
        self.policy.load_state_dict(state)
        if missing := [key for key in ("baseline", "started") if key not in state]:
            raise CheckpointError(f"the saved search lacks {missing[0]!r}; it is damaged or no search")
        self.baseline, self.started = (state[key].to(self.device) for key in ("baseline", "started"))
        self.restore(state)
        self._final_formats = []

    def _sample(self, step: int, rank: int, phase: str) -> Tensor:
        generator, count = step_generator(self.seed, step, rank), self.config.samples_per_step
        return self.policy.sample(count, generator, uniform=phase == "warmup")

    def _advantage(self, reward: Tensor) -> Tensor:
        """[world_size · samples], in the order of ranks."""
        if self.config.baseline == "leave_one_out" and len(reward) > 1:
            # Samples of one rank share a batch, whose difficulty then cancels; ranks have batches of their own.
            samples = self.config.samples_per_step
            groups = reward.view(self.world_size, samples) if samples > 1 else reward
            return leave_one_out_advantage(groups).flatten()
        return (reward - self.baseline) * self.started

    def _reward(self, quality: Tensor, ratio: Tensor) -> Tensor:
        if self.config.reward == "absolute":
            return absolute_reward(quality, ratio, self.config.beta)
        if self.config.reward == "capped":
            return capped_reward(quality, ratio, self.config.beta)
        return quality

    def _program(self) -> Tensor:
        """The choice of highest probability within the band below the target.

        Scores are the learned logits: the tilt, a price on cost, has no say where cost is a constraint.
        """
        return self.problem.choice_at_target(self.policy.logits, self.config.band)
