"""The one-shot search: phases, learning, the delivered allocation, resuming, several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import CheckpointError, ConfigError, TargetError
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.objective import entropy_coefficient
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.networks import BLOCKS, LONE

FORMATS = ("int2", "e2m1", "int4", "e4m3")
STEPS = 40


def search_for(config: SearchConfig | None = None, target: Target | None = None, **arguments: Any) -> OneShotSearch:
    activation = arguments.pop("activation", "same")
    space = SearchSpace(BLOCKS, FORMATS, activation)
    target = target or Target.of(target_bits=4)
    table = CostTable(BLOCKS, space.formats, target.cost_kind)
    return OneShotSearch(SearchProblem(space, table, target), config or SearchConfig(), STEPS, **arguments)


def scores(search: OneShotSearch, seed: int = 0) -> Tensor:
    return torch.rand(search.policy.logits.shape, generator=torch.Generator().manual_seed(seed))


def made_up_quality(search: OneShotSearch, weight: Tensor, activation: Tensor) -> Tensor:
    """Float formats are good, in proportion to the layer's size."""
    good = torch.tensor([fmt.name.startswith("e") for fmt in search.problem.space.formats]).float()
    macs = torch.tensor([layer.macs for layer in search.problem.space.layers]).float()
    return ((good[weight] + good[activation]) * macs).sum() / macs.sum()


def run(search: OneShotSearch, steps: range, quality: Callable[..., Tensor] = made_up_quality) -> list[Tensor]:
    """Run steps; what was sampled in each, [samples, 2, L]."""
    sampled = []
    for step in steps:
        formats = search.begin_step(step)
        sampled.append(torch.stack([torch.stack(pair) for pair in formats]))
        search.end_step(step, torch.stack([quality(search, *pair) for pair in formats]))
    return sampled


def test_phases_follow_the_settings() -> None:
    search = search_for(SearchConfig(prior="none", warmup_fraction=0.25, explore_fraction=0.5))
    phases = [search.phase(step) for step in range(STEPS)]
    assert phases == ["warmup"] * 10 + ["search"] * 10 + ["final"] * 20


def test_the_policy_learns_only_in_the_search_phase() -> None:
    search = search_for(SearchConfig(prior="none", warmup_fraction=0.25, explore_fraction=0.5))
    start = search.policy.logits.detach().clone()
    run(search, range(10))
    assert torch.equal(search.policy.logits, start)
    run(search, range(10, 20))
    learned = search.policy.logits.detach().clone()
    assert not torch.equal(learned, start)
    final = run(search, range(20, STEPS))
    assert torch.equal(search.policy.logits, learned)
    assert all(torch.equal(formats, final[0]) for formats in final)
    chosen = search.problem.space.indices(search.problem.space.choice(search.finalize().allocation))
    assert torch.equal(final[0][0], torch.stack(chosen))


@pytest.mark.parametrize("activation", ["same", "separate"])
def test_an_update_is_the_paper_equation(activation: str) -> None:
    """One step of the paper preset, written out: Adam on −A·Σ log π + β_H·mean H with A = Q + β|C/C_t − 1| − EMA."""
    config = SearchConfig.preset("paper", policy_learning_rate=0.1, entropy_weight=0.5, beta=-0.5)
    search = search_for(config, activation=activation, seed=5)
    logits = torch.zeros_like(search.policy.logits, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1)
    baseline = None
    for step in range(STEPS):
        weight, activations = search.begin_step(step)[0]
        quality = made_up_quality(search, weight, activations)
        search.end_step(step, quality[None])

        cost = sum(
            layer.macs * search.problem.space.formats[w].bits * search.problem.space.formats[a].bits
            for layer, w, a in zip(BLOCKS, weight.tolist(), activations.tolist(), strict=True)
        )
        reward = quality - 0.5 * abs(cost / sum(layer.macs * 16 for layer in BLOCKS) - 1)
        if step >= STEPS // 4:
            choice = search.problem.space.choice(
                search.problem.space.allocation(
                    torch.zeros(len(search.problem.space.decisions), dtype=torch.long)
                    .index_put((search.problem.space.weight_decision,), weight)
                    .index_put((search.problem.space.activation_decision,), activations)
                )
            )
            log_p = torch.log_softmax(logits, -1)
            entropy = -(log_p.exp() * log_p).sum(-1).mean()
            assert baseline is not None
            loss = -(reward - baseline) * log_p[torch.arange(len(choice)), choice].sum()
            loss = loss + entropy_coefficient(step, STEPS // 4, STEPS, 0.5) * entropy
            adam.zero_grad()
            loss.backward()
            adam.step()
        baseline = reward if baseline is None else 0.9 * baseline + 0.1 * reward
    # Adam divides by the root of the squared gradient, which enlarges float32 rounding where gradients nearly vanish
    torch.testing.assert_close(search.policy.logits, logits, rtol=1e-3, atol=1e-3)
    assert logits.detach().abs().max() > 0.5  # and there was something to compare


def test_what_is_rewarded_becomes_probable() -> None:
    config = SearchConfig(prior="none", policy_learning_rate=0.2, samples_per_step=4, explore_fraction=1.0)
    search = search_for(config)
    run(search, range(STEPS))
    p = search.probabilities()
    floats = torch.tensor([fmt.name.startswith("e") for fmt in search.problem.space.formats])
    assert p[:, floats].sum(-1).min() > 0.9
    assert search.policy.expected_cost().item() / search.problem.target_cost == pytest.approx(1, abs=0.3)
    assert {fmt.weight.name for fmt in search.finalize().allocation.values()} <= {"e2m1", "e4m3", "int2"}


def test_the_prior_orders_formats_and_starts_at_the_target() -> None:
    search = search_for(SearchConfig(prior_strength=50.0))
    prior = scores(search)
    search.start_from(prior)
    torch.testing.assert_close(search.policy.logits, -50 * (prior - prior.amin(1, keepdim=True)))
    assert search.policy.expected_cost().item() == pytest.approx(search.problem.target_cost, rel=1e-5)  # float32 tilt


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_the_prior_has_the_entropy_that_is_asked_for_whatever_the_scores_are_worth(scale: float) -> None:
    probabilities = []
    for factor in (1.0, scale):
        search = search_for(SearchConfig(prior_entropy=0.4))
        search.start_from(scores(search) * factor)
        assert search.policy.entropy().item() == pytest.approx(0.4, abs=1e-3)  # 24 halvings of log κ
        assert search.policy.expected_cost().item() == pytest.approx(search.problem.target_cost, rel=1e-4)
        probabilities.append(search.probabilities())
    torch.testing.assert_close(*probabilities, rtol=1e-2, atol=1e-3)  # the entropy's tolerance


def test_without_exploration_the_result_is_the_integer_program_over_the_prior() -> None:
    search = search_for(SearchConfig(explore_fraction=0.0))
    prior = scores(search)
    search.start_from(prior)
    search.begin_step(0)
    low, high = 0.98 * search.problem.target_cost, search.problem.target_cost
    best = search.problem.best_choice(-prior, low=low, high=high)
    assert search.finalize().allocation == search.problem.space.allocation(best)


@pytest.mark.parametrize("bad", [torch.zeros(2, 2), torch.full((4, 4), torch.nan)])
def test_a_bad_prior_is_refused(bad: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"needs finite scores \[4, 4\]"):
        search_for().start_from(bad)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize(
    "target",
    [
        Target.of(target_bits=4), Target.of(target_bits=3.3), Target.of(target_bits=4, cap=True),
        Target.of(target_size_mb=0.0003, cap=True), Target.of(target_ratio=1 / 100),
    ],
    ids=["bits", "fraction", "cap", "bytes", "ratio"],
)  # fmt: skip
def test_the_result_meets_the_target(target: Target, preset: str, seed: int) -> None:
    search = search_for(SearchConfig.preset(preset), target, activation="separate")
    with torch.no_grad():
        search.policy.logits.copy_(5 * scores(search, seed))
    final = search.finalize()
    cost = search.problem.costs.of(final.allocation)
    assert cost == final.cost
    assert final.cost_ratio == cost / search.problem.target_cost
    assert cost <= search.problem.target_cost if target.cap else abs(cost / search.problem.target_cost - 1) <= 0.02
    argmax = search.problem.space.allocation(search.policy.logits.argmax(-1))
    assert final.argmax_cost_ratio == search.problem.costs.of(argmax) / search.problem.target_cost
    assert final.repaired == (final.allocation != argmax)


def test_the_arg_max_is_kept_where_it_meets_the_target() -> None:
    search = search_for(SearchConfig.preset("paper"))
    int4 = search.problem.space.choice(search.problem.space.allocation(torch.full((4,), 2)))
    with torch.no_grad():
        search.policy.logits[torch.arange(4), int4] = 1.0
    final = search.finalize()
    assert not final.repaired
    assert {str(formats) for formats in final.allocation.values()} == {"W int4 / A int4"}


@pytest.mark.parametrize(
    ("formats", "bits"),
    [(("int2", "int4"), 5), (("int4", "int8"), 3)],
    ids=["above the dearest", "below the cheapest"],
)
def test_a_target_out_of_reach_fails_at_once(formats: tuple[str, ...], bits: float) -> None:
    space = SearchSpace(LONE, formats)
    with pytest.raises(TargetError, match="the search space, which reaches from"):
        OneShotSearch(
            SearchProblem(space, CostTable(LONE, space.formats), Target.of(target_bits=bits)), SearchConfig(), 10
        )


def test_a_target_in_a_gap_of_the_space_fails_at_once() -> None:
    space = SearchSpace(LONE, ("int2", "int8"), tie=["model"])
    with pytest.raises(TargetError, match="the space has a gap there"):
        OneShotSearch(
            SearchProblem(space, CostTable(LONE, space.formats), Target.of(target_bits=5)), SearchConfig(), 10
        )
    # a cap has no lower bound
    cap = OneShotSearch(
        SearchProblem(space, CostTable(LONE, space.formats), Target.of(target_bits=5, cap=True)), SearchConfig(), 10
    )
    assert cap.finalize().cost_ratio == pytest.approx(4 / 25)


@pytest.mark.parametrize("stop", [0, 5, 17, 24, 30])
def test_resuming_is_exact(stop: int) -> None:
    """Stopped in the warm-up, in the search, and after the allocation was frozen (24 of 40 steps)."""
    config = SearchConfig(warmup_fraction=0.25, explore_fraction=0.6, samples_per_step=2, policy_learning_rate=0.1)
    whole, first, second = (search_for(config, seed=3) for _ in range(3))
    for search in (whole, first):
        search.start_from(scores(search))
    sampled = run(whole, range(STEPS))
    run(first, range(stop))
    second.load_state_dict(first.state_dict())
    again = run(second, range(stop, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(again, sampled[stop:], strict=True))
    assert second.finalize() == whole.finalize()
    expected, found = whole.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_saved_state_is_not_changed_by_what_follows() -> None:
    config = SearchConfig(prior="none", explore_fraction=0.3)
    search = search_for(config)
    run(search, range(5))
    state = search.state_dict()
    copy = {key: value.clone() for key, value in state.items()}
    run(search, range(5, 10))
    assert all(torch.equal(copy[key], state[key]) for key in copy)
    resumed = search_for(config)
    resumed.load_state_dict(state)
    run(resumed, range(5, 10))
    assert all(torch.equal(copy[key], state[key]) for key in copy)


def test_a_foreign_or_damaged_state_is_refused() -> None:
    search = search_for()
    with pytest.raises(CheckpointError, match=r"needs \[4, 4\]"):
        search.load_state_dict(search_for(activation="separate").state_dict())
    state = search.state_dict()
    del state["baseline"]
    with pytest.raises(CheckpointError, match="lacks 'baseline'"):
        search.load_state_dict(state)


@pytest.mark.parametrize("samples", [1, 2])
def test_two_ranks_learn_one_policy_from_different_samples(samples: int) -> None:
    config = SearchConfig(prior="none", samples_per_step=samples, policy_learning_rate=0.1, explore_fraction=0.6)
    mailbox: dict[int, Tensor] = {}
    ranks = [
        search_for(config, seed=1, rank=rank, world_size=2, gather=lambda _: torch.cat([mailbox[0], mailbox[1]]))
        for rank in range(2)
    ]
    different = 0
    for step in range(STEPS):
        formats = [search.begin_step(step) for search in ranks]
        for rank, search in enumerate(ranks):
            mailbox[rank] = torch.stack([made_up_quality(search, *pair) for pair in formats[rank]])
        for rank, search in enumerate(ranks):
            search.end_step(step, mailbox[rank])
        different += int(not all(torch.equal(a[0], b[0]) for a, b in zip(*formats, strict=True)))
        assert torch.equal(ranks[0].policy.logits, ranks[1].policy.logits)
    assert different >= 12  # of 24 steps that sample; they coincide more often as the policy commits
    assert ranks[0].finalize() == ranks[1].finalize()
    assert ranks[0].state_dict().keys() == ranks[1].state_dict().keys()
    assert ranks[0].probabilities().amax() > 0.5  # it has learned something to agree on


def test_difficult_batches_do_not_count_against_formats() -> None:
    """Two samples per rank share a batch: whatever is added to both of a rank changes nothing."""
    config = SearchConfig(prior="none", samples_per_step=2, policy_learning_rate=0.1, explore_fraction=0.3)

    def learned(difficulty: float) -> Tensor:
        other = torch.tensor([0.25, 0.75])
        search = search_for(config, rank=0, world_size=2, gather=lambda own: torch.cat([own, other - difficulty]))
        run(search, range(10), lambda s, w, a: made_up_quality(s, w, a))
        return search.policy.logits.detach()

    # difficulty is a power of two and the qualities have few bits, but means round
    torch.testing.assert_close(learned(0.0), learned(8.0), rtol=1e-4, atol=1e-4)


def test_a_single_sample_is_compared_with_the_moving_average() -> None:
    search = search_for(
        SearchConfig(prior="none", explore_fraction=0.3, cost_weight=0.0, entropy_weight=0.0, baseline_momentum=0.5)
    )
    start = search.policy.logits.detach().clone()
    run(search, range(5), lambda *_: torch.tensor(3.0))  # nothing is better than anything else
    assert torch.equal(search.policy.logits, start)


def test_metrics_are_those_of_the_samples() -> None:
    search = search_for(SearchConfig(prior="none", samples_per_step=3))
    formats = search.begin_step(0)
    quality = torch.tensor([1.0, 2.0, 6.0])
    search.end_step(0, quality)
    metrics = search.metrics()
    costs = [search.problem.costs.cost(*pair).item() for pair in formats]
    mean = sum(costs) / 3 / search.problem.target_cost
    assert metrics["reward"].item() == 3.0
    assert metrics["cost_ratio"].item() == pytest.approx(mean, rel=1e-6)  # float32
    assert metrics["entropy"].item() == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
