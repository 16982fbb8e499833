"""A floor of accuracy for a search: precision rises until it holds, the weights are trained on, or exit status 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import ConfigError, FloorError
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.pipeline.floor import Floor
from fliqs_hf.pipeline.search import main, script
from fliqs_hf.pipeline.search_floor import climb, floor_of, more_precise
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training.arguments import SearchArguments, TrainingArguments
from tests.helpers.networks import LONE
from tests.recipes.test_vit import write

ORDER = [Allocation.uniform([layer.name for layer in LONE], fmt) for fmt in ("int2", "int4", "int8")]


def right(wrong: int, images: int = 2000) -> np.ndarray:
    return np.arange(images) >= wrong


@pytest.mark.parametrize(("wrong", "tests"), [([60, 0, 0], 1), ([200, 60, 0], 2), ([200, 150, 61], 3)])
def test_it_climbs_until_the_floor_holds(wrong: list[int], tests: int) -> None:
    trained: list[Any] = []

    def train_on(model: Any, allocation: Allocation, number: int) -> str:
        trained.append((model, allocation, number))
        return f"{model}+"

    floor = Floor(0.01, None)
    model, trials = climb(ORDER, "w", right(60), lambda _, one: right(wrong[ORDER.index(one)]), train_on, floor)
    assert model == "w" + "+" * (tests - 1) and len(trials) == tests and trials[-1].met
    assert [entry[1:] for entry in trained] == [(ORDER[number], number) for number in range(1, tests)]
    assert [entry[0] for entry in trained] == [
        "w" + "+" * number for number in range(tests - 1)
    ]  # from the last weights
    missed, trials = climb(ORDER, "w", right(60), lambda *_: right(100), lambda *_: "x", floor)
    assert missed is None and len(trials) == 3


def test_more_tests_ask_for_more_confidence() -> None:
    """4 of 2000 lost are less than 0.5 points at 95 %, and not at 1 − 0.05 / 3 (`drop_bound`: 0.00445 and 0.00553)."""
    floor, fp32, packed = Floor(0.005, None), right(60), right(64)
    assert climb(ORDER[:1], "w", fp32, lambda *_: packed, lambda *_: "w", floor)[0] == "w"
    assert climb(ORDER, "w", fp32, lambda *_: packed, lambda *_: "w", floor)[0] is None


def test_what_comes_next_is_dearer_up_to_the_dearest() -> None:
    formats = ("int2", "int4", "int8")
    space, table = SearchSpace(LONE, formats), CostTable(LONE, formats)
    search = OneShotSearch(SearchProblem(space, table, Target("bits", 4)), SearchConfig(), 10)
    search.start_from(torch.tensor([[1.0, 0.2, 0.01]] * 5) * torch.arange(1, 6)[:, None])
    first = search.finalize().allocation
    order = more_precise(search, first)
    costs = [table.of(one) for one in order]
    assert order[0] == first and costs == sorted(costs) and costs[-1] == table.uniform("int8") and len(order) > 2
    capped = OneShotSearch(SearchProblem(space, table, Target("bits", 4, cap=True)), SearchConfig(prior="none"), 10)
    assert more_precise(capped, capped.finalize().allocation) == [capped.finalize().allocation]


def test_contradictions_are_refused() -> None:
    assert floor_of(SearchArguments(), TrainingArguments(), 3) is None
    with pytest.raises(ConfigError, match="one target, not with 2"):
        floor_of(SearchArguments(max_drop=1.0), TrainingArguments(), 2)
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        floor_of(SearchArguments(min_accuracy=0.5), TrainingArguments(load_best_model_at_end=True), 1)


def test_a_search_with_a_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path, finetune_steps=0, max_steps=2, max_drop=99.0, search_space=["int2", "int8"]))
    (result,) = main([file])
    run = tmp_path / "run"
    assert result["floor"]["trials"][0]["met"] and result["floor"]["max_drop"] == 0.99
    assert json.loads((run / "fliqs/results.json").read_text())["floor"] == result["floor"]
    impossible = [file, "--min_accuracy", "1", "--overwrite_output_dir"]
    with pytest.raises(FloorError, match="no model is delivered"):
        main(impossible)
    assert not (run / "config.json").exists() and not (run / "fliqs/results.json").exists()
    trials = json.loads((run / "fliqs/floor.json").read_text())["trials"]
    assert len(trials) > 2 and not any(trial["met"] for trial in trials)
    assert {entry["weight"] for entry in trials[-1]["allocation"].values()} == {"int8"}
    assert not [entry for entry in (run / "fliqs").iterdir() if entry.name.startswith("floor") and entry.is_dir()]
    capsys.readouterr()
    assert script([file, "--min_accuracy", "1", "--cap", "--overwrite_output_dir"]) == 1
    assert "trained was the only allocation" in capsys.readouterr().err
