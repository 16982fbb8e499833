"""What searches that learn a policy have in common: the policy, its optimizer, what is stored of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation
from fliqs_hf.oneshot.policy import Policy
from fliqs_hf.selection import SearchProblem

#: [n] of every rank -> [world_size · n] on every rank, in the order of ranks
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FinalChoice:
    """The allocation that a search ends with.

    Attributes:
        cost_ratio: cost / target.
        argmax_cost_ratio: the same for the policy's arg-max, which the integer program may have replaced.
        repaired: whether the allocation differs from the arg-max.
    """

    allocation: Allocation
    cost: float
    cost_ratio: float
    argmax_cost_ratio: float
    repaired: bool

    @classmethod
    def of(cls, problem: SearchProblem, choice: Tensor, argmax: Tensor) -> FinalChoice:
        """From the chosen and the most probable format of every decision, int64 [D] each, on the CPU."""
        cost, argmax_cost = (float(problem.cost(one)) for one in (choice, argmax))
        return cls(
            allocation=problem.space.allocation(choice),
            cost=cost,
            cost_ratio=cost / problem.target_cost,
            argmax_cost_ratio=argmax_cost / problem.target_cost,
            repaired=not torch.equal(choice, argmax),
        )


class PolicySearch:
    """A policy that Adam learns. All ranks hold the same one.

    Attributes:
        final: what the search has ended with, None before that.
    """

    def __init__(
        self,
        problem: SearchProblem,
        learning_rate: float,
        *,
        seed: int,
        rank: int,
        world_size: int,
        device: torch.device | str,
        gather: Gather | None,
    ) -> None:
        self.problem = problem
        self.seed, self.rank, self.world_size, self.device = seed, rank, world_size, torch.device(device)
        self.gather: Gather = gather or (lambda values: values)
        self.policy = Policy(problem, device)
        self.optimizer = torch.optim.Adam([self.policy.logits], lr=learning_rate)
        self.final: FinalChoice | None = None

    def end_with(self, choice: Tensor) -> FinalChoice:
        """Make a choice, int64 [D], the final one."""
        self.final = FinalChoice.of(self.problem, choice, self.policy.argmax().cpu())
        return self.final

    def stored(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of the optimizer and the final choice beside a search's `own` tensors: copies, for safetensors."""
        state = dict(own)
        for key, value in self.optimizer.state.get(self.policy.logits, {}).items():
            state[f"adam.{key}"] = value
        if self.final is not None:
            state["final"] = self.problem.space.choice(self.final.allocation)
        return {key: value.detach().clone().contiguous() for key, value in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """What `stored` has added; after the policy, from whose arg-max a final choice may differ."""
        adam = {key.removeprefix("adam."): value for key, value in state.items() if key.startswith("adam.")}
        self.optimizer.state.clear()
        if adam:
            on_host = ("step",)  # as Adam keeps it
            self.optimizer.state[self.policy.logits] = {
                key: value.to("cpu" if key in on_host else self.device, copy=True) for key, value in adam.items()
            }
        self.final = None
        if "final" in state:
            self.end_with(state["final"].cpu())
