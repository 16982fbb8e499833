"""Differentiable search: formats are mixed by learned probabilities, which descend the training loss directly.

Weights and logits are trained on the same batches in the same backward pass (EdMIPS); DNAS as published alternates
between two parts of the training data. Every step computes every format, in time and in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fliqs_hf.baselines.mixture import Mixture
from fliqs_hf.checks import is_number
from fliqs_hf.errors import CheckpointError, ConfigError, TrainingError
from fliqs_hf.nn import FormatSwitch, QuantizerSettings, make_searchable
from fliqs_hf.oneshot import FinalChoice
from fliqs_hf.oneshot.policy import step_generator
from fliqs_hf.oneshot.policy_search import Gather, PolicySearch
from fliqs_hf.selection import SearchProblem
from fliqs_hf.training import StepHook

Relaxation = Literal["softmax", "gumbel"]


@dataclass(frozen=True)
class DifferentiableConfig:
    """Settings of a differentiable search. Raises: ConfigError: a value out of range, which it names."""

    #: `softmax`: p = softmax(logits / T), as in EdMIPS. `gumbel`: p = softmax((logits + Gumbel noise) / T), as in
    #: DNAS, with new noise at every step and rank.
    relaxation: Relaxation = "softmax"
    #: T at the first and after the last step of the search, falling exponentially in between.
    temperature_start: float = 1.0
    temperature_end: float = 1.0
    #: Adam on the logits. 0.02 and 0.05 commit too late for runs of some hundred steps: at 2.5 bits they ended with
    #: a loss of 0.207 and 0.173, 0.1 with 0.149 (digits, 400 steps, one seed, on its test images).
    architecture_learning_rate: float = 0.1
    #: Weight of |E[C]/C_target − 1| in the loss.
    cost_weight: float = 1.0
    #: Step at which the allocation is frozen, as a fraction of the run; the rest trains the weights for it.
    explore_fraction: float = 0.3

    def __post_init__(self) -> None:
        if self.relaxation not in get_args(Relaxation):
            raise ConfigError(
                f"relaxation={self.relaxation!r} does not exist; choose from {', '.join(get_args(Relaxation))}"
            )
        for name in ("temperature_start", "temperature_end", "architecture_learning_rate", "explore_fraction"):
            self._check(name, 0.0, 1.0 if name == "explore_fraction" else math.inf, above=True)
        self._check("cost_weight", 0.0, math.inf, above=False)

    def _check(self, name: str, low: float, high: float, *, above: bool) -> None:
        value = getattr(self, name)
        if not is_number(value, low, high) or (above and value == low):
            least = "above" if above else "at least"
            limit = f" and at most {high:g}" if high < math.inf else ""
            raise ConfigError(f"{name}={value!r} must be a number {least} {low:g}{limit}")


class DifferentiableSearch(PolicySearch):
    """Logits of the formats, which mix them instead of being sampled from, and the allocation that they end in.

    Gradients are averaged over the ranks before every update.
    """

    def __init__(
        self,
        problem: SearchProblem,
        config: DifferentiableConfig,
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
            total_steps: optimizer steps of the whole run.
            gather: [n] of every rank -> [world_size · n] on every rank, in the order of ranks.
        Raises: ConfigError: a space that decides weights and inputs apart: K² branches a layer would be needed.
            TargetError: the target is outside the range of the space, or in a gap of it.
        """
        space = problem.space
        if space.activation != "same":
            raise ConfigError(
                f"a differentiable search needs a space with activation='same', not {space.activation!r}; "
                "use the one-shot search for formats of weights and inputs apart"
            )
        super().__init__(
            problem, config.architecture_learning_rate, seed=seed, rank=rank, world_size=world_size, device=device,
            gather=gather,
        )  # fmt: skip
        self.config = config
        self.search_end = max(1, round(config.explore_fraction * total_steps))
        problem.choice_at_target(self.policy.logits)  # finds a gap now and not at the end

    def searching(self, step: int) -> bool:
        return step < self.search_end

    def temperature(self, step: int) -> float:
        start, end = self.config.temperature_start, self.config.temperature_end
        return float(start * (end / start) ** min(1.0, step / self.search_end))

    def probabilities(self, step: int) -> Tensor:
        """What step `step` mixes by, with gradient: float32 [D, K], 0 for formats that are not allowed."""
        logits = self.policy.log_probabilities
        if self.config.relaxation == "gumbel":
            generator = step_generator(self.seed, step, self.rank, "gumbel")
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
            logits = logits - torch.log(-torch.log(noise)).float().to(self.device)
        return torch.softmax(logits / self.temperature(step), dim=-1)

    def expected_cost(self, step: int) -> Tensor:
        """Exact expected cost of the distribution that step `step` mixes or samples from: float64, with gradient."""
        temperature = self.temperature(step) if self.config.relaxation == "softmax" else 1.0
        p = torch.softmax(self.policy.log_probabilities / temperature, dim=-1)
        return self.problem.expected_cost(p)

    def update(self, step: int) -> dict[str, Tensor]:
        """Add the gradient of the cost term to what backward passes have left in the logits, and take a step.

        The term depends on the logits alone, so this is the gradient of loss + weight · |E[C]/C_target − 1|.

        Returns: metrics, on the device.
        Raises: TrainingError: no backward pass has reached the logits.
        """
        logits = self.policy.logits
        if logits.grad is None:
            raise TrainingError(
                f"step {step}: no backward pass has reached the logits of the formats; train the model that the hook "
                "was made for, and call the functions of `begin_step` before its forward pass"
            )
        gathered = self.gather(logits.grad.flatten())
        logits.grad = gathered.view(self.world_size, *logits.shape).mean(0)
        ratio = self.expected_cost(step) / self.problem.target_cost
        if self.config.cost_weight:
            (self.config.cost_weight * (ratio - 1).abs()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"cost_ratio": ratio.detach(), "entropy": self.policy.entropy().detach()}

    def finalize(self) -> FinalChoice:
        """The most probable allocation that meets the target, by the integer program of the one-shot search."""
        if self.final is not None:
            return self.final
        # The logits are the log-probabilities up to a constant per decision, and finite where not allowed.
        return self.end_with(self.problem.choice_at_target(self.policy.logits))

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors only, for safetensors. The final allocation is stored as its choice."""
        return self.stored({"logits": self.policy.logits})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken. Raises: CheckpointError: a state of another search space."""
        self.policy.load_state_dict(state | {"tilt": torch.zeros_like(self.policy.logits)})
        if not any(key.startswith("adam.") for key in state):
            raise CheckpointError("the saved search lacks the state of its optimizer; it is damaged or no search")
        self.restore(state)


class DifferentiableHook:
    """A differentiable search as the training loop sees it. Implements `training.StepHook`.

    `finish` must be called after training: it leaves ordinary searchable layers in the final allocation.
    """

    def __init__(self, search: DifferentiableSearch, model: nn.Module, switch: FormatSwitch) -> None:
        """
        Args:
            model: searchable over the layers and formats of the search's space, in the same order, through `switch`.
        """
        search.problem.space.check_switch(switch)
        self.search, self.switch = search, switch
        self.mixture = Mixture(model, search.problem.space, switch)
        self._settled = False

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        if not self.search.searching(step):
            self.finish()
            return [lambda: None]
        # A function, as every backward pass of the step needs a graph of its own.
        return [lambda: self.mixture.set(self.search.probabilities(step))]

    def end_step(self, step: int, quality: Tensor) -> dict[str, Tensor]:
        self.mixture.set(None)
        return self.search.update(step) if self.search.searching(step) else {}

    def finish(self) -> FinalChoice:
        """End the mixture and set the formats of the final allocation."""
        final = self.search.finalize()
        if not self._settled:
            self.mixture.remove()
            self.switch.set_allocation(final.allocation)
            self._settled = True
        return final

    def settled(self, step: int) -> bool:
        return not self.search.searching(step)

    def log(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return self.search.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.search.load_state_dict(state)


def differentiable_search(
    model: nn.Module,
    problem: SearchProblem,
    run: Callable[[StepHook], object],
    total_steps: int,
    config: DifferentiableConfig | None = None,
    *,
    settings: QuantizerSettings | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    gather: Gather | None = None,
) -> FinalChoice:
    """Search and train `model` in place, which is searchable afterwards, in the final allocation.

    Args:
        model: on the device that it is trained on; its layers are plain ones.
        run: trains the model for `total_steps` steps with the hook that it is given, such as
            `lambda hook: train(model, data, config, accelerator, hook=hook)`.
        rank, world_size, gather: see `DifferentiableSearch`; from the accelerator where there are several processes.
    Raises: ConfigError: a space that decides weights and inputs apart, or a model that is searchable already.
        TargetError: no allocation meets the target.
    Source: DNAS (Wu et al. 2018), EdMIPS (Cai and Vasconcelos 2020).
    """
    device = next(model.parameters()).device
    search = DifferentiableSearch(
        problem, config or DifferentiableConfig(), total_steps,
        seed=seed, rank=rank, world_size=world_size, device=device, gather=gather,
    )  # fmt: skip
    space = problem.space
    groups = {layer.name: layer.input_group for layer in space.layers}
    names = [layer.name for layer in space.layers]
    switch = make_searchable(model, space.formats, names=names, input_groups=groups, settings=settings)
    hook = DifferentiableHook(search, model, switch)
    try:
        run(hook)
    finally:
        hook.mixture.remove()  # also of an interrupted run
    return hook.finish()
