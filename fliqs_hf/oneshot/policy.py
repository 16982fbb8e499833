"""The policy: an independent categorical distribution over formats for each decision."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fliqs_hf.errors import CheckpointError
from fliqs_hf.selection.problem import SearchProblem


def step_generator(seed: int, step: int, rank: int, purpose: str = "policy") -> torch.Generator:
    """A generator that depends on nothing but its arguments: an interrupted run samples the same after resuming."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


#: Log-probability of formats that a decision may not take. Its exponential is exactly 0, and unlike −∞ it leaves
#: entropy and gradients finite.
_FORBIDDEN = -1e9


class Policy:
    """π_d(k) = softmax(logits + tilt)[d, k], over the formats that the space allows.

    Attributes:
        logits: what is learned and what the final allocation is read from; float32 [D, K].
        tilt: a price on cost that keeps the expected cost of samples at the target, not learned; float32 [D, K].
    """

    def __init__(self, problem: SearchProblem, device: torch.device | str = "cpu") -> None:
        space = problem.space
        shape = (len(space.decisions), len(space.formats))
        self.problem = problem
        self.logits = torch.zeros(shape, device=device, requires_grad=True)
        self.tilt = torch.zeros(shape, device=device)
        self._mask = torch.zeros(shape).masked_fill(~space.allowed, _FORBIDDEN).to(device)

    @property
    def log_probabilities(self) -> Tensor:
        """log π, [D, K], with gradient."""
        forbidden = self._mask < 0  # excluded before the softmax whatever the size of the logits, finite after it
        logits = (self.logits + self.tilt).masked_fill(forbidden, -torch.inf)
        return torch.log_softmax(logits, dim=-1).masked_fill(forbidden, _FORBIDDEN)

    def sample(self, count: int, generator: torch.Generator, *, uniform: bool = False) -> Tensor:
        """`count` independent choices from π, or from the uniform distribution: int64 [count, D].

        Gumbel noise is drawn on the CPU, so that every device samples the same; adding it needs no synchronisation.
        """
        noise = torch.rand(count, *self.logits.shape, generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(noise.clamp(min=1e-300)))
        log_p = self._mask if uniform else self.log_probabilities.detach()
        return (log_p.double() + gumbel.to(self.logits.device, non_blocking=True)).argmax(-1)

    def log_prob(self, choice: Tensor) -> Tensor:
        """log π(choice), **summed** over decisions: [n] for choices [n, D]."""
        table = self.log_probabilities.expand(choice.shape[0], -1, -1)
        return table.gather(-1, choice.unsqueeze(-1)).squeeze(-1).sum(-1)

    def entropy(self) -> Tensor:
        """mean_d H(π_d), nats."""
        log_p = self.log_probabilities
        return -(log_p.exp() * log_p).sum(-1).mean()

    def expected_cost(self) -> Tensor:
        """Exact expected cost of a sample, float64, with gradient."""
        return self.problem.expected_cost(self.log_probabilities.exp())

    def signals(self) -> Tensor:
        """−log π without the tilt, lower is better: what the final allocation goes by, on the CPU, [D, K]."""
        return -torch.log_softmax(self.logits.detach(), dim=-1).cpu()

    def argmax(self) -> Tensor:
        """The most probable choice of every decision, int64 [D]."""
        return self.log_probabilities.argmax(-1)

    @torch.no_grad()
    def match_expected_cost(self, target: float) -> float:
        """Set `tilt` = −λ·marginal cost such that the expected cost is `target`, by bisection on λ.

        Returns: expected cost / target afterwards: 1 where the target is within the range of the space.
        """
        prices = marginal_costs(self.problem).to(self.logits.device) / target
        bound = 4 * (1 + float(self.logits.abs().max()))
        low, high = -bound / float(prices.abs().max()), bound / float(prices.abs().max())
        while float(self._tilted(high, prices)) > target and high < 1e30:
            high *= 4
        while float(self._tilted(low, prices)) < target and low > -1e30:
            low *= 4
        for _ in range(60):
            middle = (low + high) / 2
            if float(self._tilted(middle, prices)) > target:
                low = middle
            else:
                high = middle
        return float(self._tilted(high, prices)) / target

    def _tilted(self, multiplier: float, prices: Tensor) -> Tensor:
        self.tilt = (-multiplier * prices).float()
        return self.expected_cost()

    def state_dict(self) -> dict[str, Tensor]:
        return {"logits": self.logits.detach().clone(), "tilt": self.tilt.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: CheckpointError: the state is of a policy over another space."""
        for key in ("logits", "tilt"):
            if key not in state or state[key].shape != self.logits.shape:
                found = list(state[key].shape) if key in state else "missing"
                raise CheckpointError(
                    f"the saved policy's {key} is {found}, this search space needs {list(self.logits.shape)}; resume "
                    f"with the model, formats and ties that the run was started with"
                )
        with torch.no_grad():
            self.logits.copy_(state["logits"])
            self.tilt.copy_(state["tilt"])


def marginal_costs(problem: SearchProblem) -> Tensor:
    """What each choice of each decision costs when every other decision is uniform: float64 [D, K].

    Exact up to a constant per decision where weights and inputs have one format; for products of two decisions it is
    the mean over the other one.
    """
    allowed = problem.space.allowed
    uniform = (allowed.double() / allowed.sum(-1, keepdim=True)).requires_grad_(True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(problem.expected_cost(uniform), uniform)
    return gradient.detach()
