"""A baseline that gives the layers nearest to the input the most bits."""

import torch

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines import register_baseline
from fliqs_hf.selection import SearchProblem


def first_layers(problem: SearchProblem, seed: int) -> Allocation:
    """Bits count the more, the nearer to the input a decision is."""
    depth = torch.arange(len(problem.space.decisions), 0, -1.0)
    bits = torch.tensor([fmt.effective_bits for fmt in problem.space.formats])
    return problem.space.allocation(problem.choice_at_target(depth[:, None] * bits))


register_baseline("first-layers", first_layers)
