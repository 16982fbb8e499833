"""Multi-trial search: proposals at the target, the same result after an interruption, journals that do not fit."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines import MultiTrialResult, ShortTraining, multi_trial, random_allocation
from fliqs_hf.cost import CostTable, LayerInfo, Target, trace_layers
from fliqs_hf.errors import CheckpointError, ConfigError, DependencyError, TargetError, TrainingError
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import TrainConfig
from fliqs_hf.training.seeds import derived_seed
from tests.helpers.models import tiny
from tests.helpers.networks import BLOCKS
from tests.training.test_loop import Blobs

FORMATS = ("int2", "int3", "int4", "e2m1", "int6", "int8")
LAYERS = tuple(
    LayerInfo(f"layer{i}", "linear", macs, 8, 4, i) for i, macs in enumerate((101, 230, 57, 499, 313, 166, 271, 90))
)
SPACE = SearchSpace(LAYERS, FORMATS, exclude={"layer3": ["int2"]})
TABLE = CostTable(LAYERS, SPACE.formats)
TARGET = Target.of(target_bits=4)
SAMPLERS = pytest.mark.parametrize("sampler", ["random", "optuna"])
#: What each choice of each decision is worth: an additive objective, whose optimum the integer program gives.
WORTH = torch.rand(len(SPACE.decisions), len(FORMATS), generator=torch.Generator().manual_seed(5))


def worth(allocation: Allocation, number: int) -> float:
    choice = SPACE.choice(allocation)
    return float(WORTH.gather(1, choice[:, None]).sum())


def search(trials: int = 14, objective: Any = worth, **arguments: Any) -> MultiTrialResult:
    return multi_trial(SearchProblem(SPACE, TABLE, TARGET), objective, trials, **arguments)


def outcome(result: MultiTrialResult) -> list[tuple[Any, ...]]:
    return [(trial.number, trial.choice, trial.cost, trial.score) for trial in result.trials]


@SAMPLERS
def test_every_proposal_meets_the_target_and_the_best_is_kept(sampler: Any) -> None:
    result = search(sampler=sampler)
    target = TARGET.resolve(TABLE)
    assert len({trial.choice for trial in result.trials}) > 7
    for number, trial in enumerate(result.trials):
        allocation = SPACE.allocation(torch.tensor(trial.choice))
        assert 0.97 <= TABLE.of(allocation) / target <= 1
        assert (trial.number, trial.cost, trial.score) == (number, TABLE.of(allocation), worth(allocation, 0))
    assert result.best.score == max(trial.score for trial in result.trials)
    assert result.allocation == SPACE.allocation(torch.tensor(result.best.choice))


@SAMPLERS
def test_weights_and_inputs_decided_apart(sampler: Any) -> None:
    space = SearchSpace(BLOCKS, FORMATS, "separate")
    table = CostTable(BLOCKS, space.formats)
    result = multi_trial(SearchProblem(space, table, TARGET), lambda allocation, number: number, 3, sampler=sampler)
    assert all(0.97 <= trial.cost / TARGET.resolve(table) <= 1 for trial in result.trials)
    assert any(pair.weight != pair.activation for pair in result.allocation.values())


@SAMPLERS
def test_the_same_seed_gives_the_same_result(sampler: Any) -> None:
    first = outcome(search(sampler=sampler, seed=1))
    assert outcome(search(sampler=sampler, seed=1)) == first
    assert outcome(search(sampler=sampler, seed=2)) != first


def test_random_proposals_are_random_allocations() -> None:
    problem = SearchProblem(SPACE, TABLE, TARGET)
    for number, trial in enumerate(search(4, seed=3).trials):
        expected = random_allocation(problem, derived_seed("multi-trial", 3, number), band=0.02 - 1e-9)
        assert SPACE.allocation(torch.tensor(trial.choice)) == expected


def test_optuna_learns_from_the_scores() -> None:
    """Its later trials are better than its first, which are random; random ones do not improve."""
    target = TARGET.resolve(TABLE)
    best = worth(SPACE.allocation(SearchProblem(SPACE, TABLE).best_choice(WORTH, low=0.97 * target, high=target)), 0)
    gains = []
    for seed in range(3):
        scores = torch.tensor([trial.score for trial in search(50, sampler="optuna", seed=seed).trials])
        assert scores.max() <= best + 1e-6
        gains.append(float(scores[-20:].mean() - scores[:10].mean()))
    assert min(gains) > 0.1 * best


@SAMPLERS
@pytest.mark.parametrize("cut", [False, True])
def test_an_interrupted_search_ends_in_the_same_result(sampler: Any, cut: bool, tmp_path: Path) -> None:
    journal = tmp_path / "folder" / "trials.jsonl"
    asked: list[int] = []

    def dies(allocation: Allocation, number: int) -> float:
        asked.append(number)
        if number == 12 and len(asked) == 13:
            raise KeyboardInterrupt
        return worth(allocation, number)

    whole = search(16, sampler=sampler)
    with pytest.raises(KeyboardInterrupt):
        search(16, dies, sampler=sampler, journal=journal)
    if cut:  # killed while it wrote trial 11
        journal.write_text(journal.read_text()[:-9])
    resumed = search(16, dies, sampler=sampler, journal=journal)
    assert outcome(resumed) == outcome(whole)
    assert asked[13:] == list(range(11 if cut else 12, 16))
    assert len(journal.read_text().splitlines()) == 17
    assert outcome(search(5, dies, sampler=sampler, journal=journal)) == outcome(whole)[:5]  # nothing more to do
    assert outcome(search(18, dies, sampler=sampler, journal=journal))[:16] == outcome(whole)  # a longer one goes on


@pytest.mark.parametrize("text", ["mine", "{}", "mine\n", "mine\nhalf", '{"search": "other", "seed": 0}'])
def test_a_foreign_file_is_no_journal(tmp_path: Path, text: str) -> None:
    (tmp_path / "trials.jsonl").write_text(text)
    with pytest.raises(CheckpointError, match="name another"):
        search(2, lambda allocation, number: 0.0, journal=tmp_path / "trials.jsonl")
    assert (tmp_path / "trials.jsonl").read_text() == text


def test_a_journal_cut_off_in_its_first_line_is_begun_again(tmp_path: Path) -> None:
    journal = tmp_path / "trials.jsonl"
    search(2, journal=str(journal))
    whole = journal.read_text()
    for length in (20, len(whole.splitlines()[0]) + 1):  # within the header, and just after it
        journal.write_text(whole[:length])
        assert outcome(search(2, journal=journal)) == outcome(search(2))
        assert [next(iter(json.loads(line))) for line in journal.read_text().splitlines()] == [
            "search",
            "number",
            "number",
        ]


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    journal = tmp_path / "trials.jsonl"
    search(2, journal=journal)
    with pytest.raises(CheckpointError, match="seed=0, this one has 1; go on with the same settings"):
        search(2, journal=journal, seed=1)
    with pytest.raises(CheckpointError, match="sampler='random', this one has 'optuna'"):
        search(2, journal=journal, sampler="optuna")
    with pytest.raises(CheckpointError, match="target_cost="):
        multi_trial(SearchProblem(SPACE, TABLE, Target.of(target_bits=5)), worth, 2, journal=journal)
    lines = journal.read_text().splitlines()
    for damaged in (lines[1].replace('"choice": [', '"choice": [99, '), "{", "[]", lines[2], '{"number": 0}'):
        journal.write_text("\n".join([lines[0], damaged]) + "\n")
        with pytest.raises(CheckpointError, match=r"cannot be read: .*; delete it to start again"):
            search(2, journal=journal)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    for trials in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=f"trials={trials} must be a whole number of at least 1"):
            search(trials)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sampler='grid' does not exist; choose from random, optuna"):
        search(sampler="grid")
    with pytest.raises(TargetError, match="above the dearest"):
        multi_trial(SearchProblem(SPACE, TABLE, Target.of(target_bits=16)), worth, 1)
    with pytest.raises(TrainingError, match="gave nan for trial 0"):
        search(objective=lambda allocation, number: float("nan"))
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(DependencyError, match=r"pip install 'fliqs-hf\[multi-trial\]'"):
        search(sampler="optuna")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_short_training_scores_on_images_that_it_does_not_train_with(accelerator: Accelerator) -> None:
    model, data = tiny("vit"), Blobs(60)
    layers = trace_layers(model)
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    settings = TrainConfig(max_steps=15, batch_size=16, learning_rate=3e-3)
    objective = ShortTraining(model, layers, data, settings, accelerator, holdout=0.25)
    assert (len(objective.held_out), len(objective.training)) == (15, 45)
    assert not set(objective.held_out.indices) & set(objective.training.indices)
    space = SearchSpace(layers, FORMATS)
    table = CostTable(layers, space.formats)
    fine = Allocation.uniform([layer.name for layer in layers], "int8")
    first = objective(fine, 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == kinds and not model.training
    result = multi_trial(SearchProblem(space, table, TARGET), objective, 2)
    assert all(trial.score < 0 for trial in result.trials)
    assert objective(fine, 7) == first  # whatever was tried in between
    untrained = ShortTraining(
        model, layers, data, TrainConfig(max_steps=1, learning_rate=1e-9), accelerator, holdout=0.25
    )
    assert first > untrained(fine, 0)


@pytest.mark.parametrize("holdout", [0.0, 1.0, 0.001, 3])
def test_a_holdout_that_leaves_nothing(accelerator: Accelerator, holdout: float) -> None:
    with pytest.raises(ConfigError, match=f"holdout={holdout} of 60 images"):
        ShortTraining(tiny("vit"), BLOCKS, Blobs(60), TrainConfig(max_steps=1), accelerator, holdout=holdout)
