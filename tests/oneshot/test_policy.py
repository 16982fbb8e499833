"""The policy's distribution against closed forms and enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fliqs_hf.cost import CostTable
from fliqs_hf.errors import CheckpointError
from fliqs_hf.oneshot import Policy
from fliqs_hf.oneshot.policy import marginal_costs, step_generator
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.networks import BLOCKS, LONE

FORMATS = ("int2", "int4", "e2m1", "int8")


def problem_of(space: SearchSpace) -> SearchProblem:
    return SearchProblem(space, CostTable(space.layers, space.formats))


def policy_with(space: SearchSpace, seed: int = 0, scale: float = 1.0, table: CostTable | None = None) -> Policy:
    policy = Policy(problem_of(space) if table is None else SearchProblem(space, table))
    with torch.no_grad():
        policy.logits.copy_(torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return policy


def test_a_new_policy_is_uniform() -> None:
    policy = Policy(problem_of(SearchSpace(LONE, FORMATS)))
    # one float32 rounding each of log, softmax and sum
    assert policy.entropy().item() == pytest.approx(math.log(4), rel=1e-6)
    assert policy.log_prob(torch.zeros(1, 5, dtype=torch.long)).item() == pytest.approx(-5 * math.log(4), rel=1e-6)


def test_log_probabilities_are_summed_over_decisions_and_sum_to_one_over_choices() -> None:
    policy = policy_with(SearchSpace(LONE[:3], FORMATS))
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    log_prob = policy.log_prob(every)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-5)  # 64 float32 terms
    assert log_prob[7].item() == pytest.approx(
        sum(policy.log_probabilities[d, k].item() for d, k in enumerate(every[7])), rel=1e-6
    )


def test_samples_follow_the_probabilities() -> None:
    policy = policy_with(SearchSpace(LONE[:2], FORMATS))
    n = 40_000
    sample = policy.sample(n, torch.Generator().manual_seed(0))
    p = policy.log_probabilities.detach().exp()
    frequency = torch.stack([(sample == k).float().mean(0) for k in range(4)], dim=1)
    # five standard deviations of a binomial frequency
    assert bool(((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all())
    # decisions are drawn independently of each other
    joint = ((sample[:, 0] == 0) & (sample[:, 1] == 1)).float().mean().item()
    both = (p[0, 0] * p[1, 1]).item()
    assert abs(joint - both) < 5 * math.sqrt(both * (1 - both) / n)


def test_uniform_samples_ignore_the_policy() -> None:
    policy = policy_with(SearchSpace(LONE, FORMATS, exclude={"layer1": ["int2"]}), scale=20)
    n = 20_000
    sample = policy.sample(n, torch.Generator().manual_seed(0), uniform=True)
    counts = torch.stack([torch.bincount(column, minlength=4) for column in sample.T]) / n
    expected = torch.full((5, 4), 0.25)
    expected[1] = torch.tensor([0, 1 / 3, 1 / 3, 1 / 3])
    assert bool(((counts - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all())


def test_a_generator_depends_on_seed_step_and_rank_only() -> None:
    def draw(*key: int) -> float:
        return torch.rand(1, generator=step_generator(*key)).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(seed, step, rank) for seed in range(3) for step in range(30) for rank in range(3)}) == 270


@pytest.mark.parametrize("activation", ["same", "separate"])
@pytest.mark.parametrize(("kind", "fixed"), [("bops", 0), ("weight_bytes", 123)])
def test_the_tilt_makes_the_expected_cost_the_target(activation: str, kind: str, fixed: float) -> None:
    space = SearchSpace(BLOCKS, FORMATS, activation)  # type: ignore[arg-type]
    table = CostTable(BLOCKS, space.formats, kind, fixed_cost=fixed)  # type: ignore[arg-type]
    problem = SearchProblem(space, table)
    cheapest, dearest = problem.reachable
    for fraction in (0.001, 0.3, 0.8, 0.999):
        target = cheapest + fraction * (dearest - cheapest)
        policy = policy_with(space, scale=3, table=table)
        before = policy.logits.detach().clone()
        assert policy.match_expected_cost(target) == pytest.approx(1, abs=1e-5)  # the tilt is float32
        assert policy.expected_cost().item() == pytest.approx(target, rel=1e-5)
        assert torch.equal(policy.logits, before)  # only the tilt has moved


def test_the_tilt_is_a_price_on_cost_alone() -> None:
    """Within a decision whose formats cost the same, the ratio of probabilities stays what the logits say."""
    space = SearchSpace(LONE, FORMATS)
    table = CostTable(LONE, space.formats)
    policy = policy_with(space)
    policy.match_expected_cost(table.uniform("int4") * 0.6)
    int4, e2m1 = FORMATS.index("int4"), FORMATS.index("e2m1")
    log_p = policy.log_probabilities
    torch.testing.assert_close(log_p[:, int4] - log_p[:, e2m1], policy.logits[:, int4] - policy.logits[:, e2m1])


def test_marginal_costs_of_unpaired_decisions_are_their_costs() -> None:
    space = SearchSpace(LONE, FORMATS)
    expected = [[layer.macs * fmt.bits**2 for fmt in space.formats] for layer in LONE]
    assert marginal_costs(problem_of(space)).tolist() == expected


def test_marginal_costs_are_means_over_what_the_other_decision_may_take() -> None:
    space = SearchSpace(LONE, "int2,int4,int8", "separate", exclude={"layer1": ["int8"]})
    costs = marginal_costs(problem_of(space))
    for row, layer in enumerate(LONE):
        mean = (2 + 4) / 2 if layer.name == "layer1" else (2 + 4 + 8) / 3
        expected = torch.tensor([2, 4, 8], dtype=torch.float64) * mean * layer.macs
        for decision in (space.weight_decision[row], space.activation_decision[row]):
            torch.testing.assert_close(costs[decision], expected)  # 1/3 is rounded


def test_excluded_formats_have_probability_zero_and_finite_gradients() -> None:
    space = SearchSpace(LONE, FORMATS, exclude={"layer0": ["int2", "int8"], "layer3": ["int2", "int4", "e2m1"]})
    table = CostTable(LONE, space.formats)
    policy = policy_with(space)
    policy.match_expected_cost(table.uniform("int4") * 2)
    assert torch.equal(policy.log_probabilities.exp() > 0, space.allowed)
    sample = policy.sample(500, torch.Generator().manual_seed(0))
    assert bool(space.allowed[torch.arange(5), sample].all())
    (policy.log_prob(sample).mean() + policy.entropy() + policy.expected_cost().float()).backward()
    assert policy.logits.grad is not None
    assert bool(policy.logits.grad.isfinite().all())
    assert not policy.logits.grad[~space.allowed].any()
    log_p = policy.log_probabilities[0, 1:3]
    remaining = -(log_p.exp() * log_p).sum()
    entropies = policy.entropy() * 5 - sum(-(row.exp() * row).sum() for row in policy.log_probabilities[[1, 2, 4]])
    torch.testing.assert_close(entropies, remaining)  # layer3 has one format left: entropy 0


def test_a_saved_policy_continues_exactly_and_only_in_its_space() -> None:
    space = SearchSpace(LONE, FORMATS)
    policy = policy_with(space)
    policy.match_expected_cost(9000)
    other = Policy(problem_of(space))
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.log_probabilities, policy.log_probabilities)
    with pytest.raises(CheckpointError, match=r"logits is \[5, 4\], this search space needs \[5, 2\]"):
        Policy(problem_of(SearchSpace(LONE, "int2,int4"))).load_state_dict(policy.state_dict())
    with pytest.raises(CheckpointError, match="tilt is missing"):
        other.load_state_dict({"logits": policy.logits})
