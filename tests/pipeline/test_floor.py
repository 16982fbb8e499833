"""A floor of accuracy: what is tested in which order, what is decided, and that it is never missed in silence."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import fliqs_hf_cli
from fliqs_hf.allocation import Allocation
from fliqs_hf.cli import recommend
from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import ConfigError
from fliqs_hf.pipeline.floor import STEPS, Floor, FloorTest, candidates, descend
from fliqs_hf.selection import CostLimit, SearchProblem, SearchSpace
from fliqs_hf.validation.statistics import drop_bound
from tests.helpers.networks import LONE

FORMATS = ("int2", "int4", "int8")
NAMES = [layer.name for layer in LONE]


def right(wrong: int, images: int = 1000) -> np.ndarray:
    return np.arange(images) >= wrong


def test_a_trial_by_hand() -> None:
    floor = Floor(0.01, 0.9, 0.95)
    trial = FloorTest.of(Allocation({}), right(50), right(53), floor)
    assert (trial.images, trial.accuracy, trial.drop) == (1000, 0.947, 0.003)
    assert trial.highest_drop == drop_bound(3, 0, 1000, 0.95, "upper")
    z, p = 1.6448536269514722, 0.947  # one-sided 95 %: the lower end of Wilson's interval of 90 %
    wilson = (p + z**2 / 2000 - z * (p * (1 - p) / 1000 + z**2 / 4e6) ** 0.5) / (1 + z**2 / 1000)
    assert trial.low == pytest.approx(wilson, rel=1e-9) and trial.met
    assert not FloorTest.of(Allocation({}), right(50), right(53), Floor(0.003, None)).met  # what is seen is not proven
    assert not FloorTest.of(Allocation({}), right(50), right(53), Floor(None, 0.94)).met
    with pytest.raises(ConfigError, match="give one"):
        Floor(None, None)
    for given, words in (((1.5, None), "max_drop"), ((None, 78), "min_accuracy"), ((0.01, None, 95), "confidence")):
        with pytest.raises(ConfigError, match=words):
            Floor(*given)


def test_the_first_miss_ends_it() -> None:
    wrong = {"int8": 51, "int4": 80, "int2": 52}  # the last one would do, and is never looked at
    order = [Allocation.uniform(NAMES, fmt) for fmt in wrong]
    seen = []

    def judge(allocation: Allocation) -> np.ndarray:
        seen.append(allocation[NAMES[0]].weight.name)
        return right(wrong[seen[-1]])

    trials = descend(order, right(50), judge, Floor(0.01, None))
    assert seen == ["int8", "int4"] and [trial.met for trial in trials] == [True, False]


def test_what_is_tested() -> None:
    space = SearchSpace(LONE, FORMATS)
    table = CostTable(LONE, FORMATS)
    scores = torch.tensor([[1.0, 0.2, 0.01]] * 5) * torch.arange(1, 6)[:, None]
    target = Target("bits", 4)
    problem = SearchProblem(space, table, target)
    found = candidates(problem, scores)
    costs = [table.of(allocation) for allocation in found]
    assert costs == sorted(costs, reverse=True) and 2 < len(costs) <= STEPS
    assert costs[0] == table.uniform("int8") and target.is_met(costs[-1], problem.target_cost)
    free = candidates(SearchProblem(space, table), scores)
    assert table.of(free[0]) == table.uniform("int8") and table.of(free[-1]) == table.uniform("int2")
    capped = SearchProblem(space, table, Target("bits", 4, cap=True))
    assert candidates(capped, scores) == [space.allocation(capped.choice_at_target(-scores))]
    limit = CostLimit(CostTable(LONE, FORMATS, "weight_bytes"), Target("size_mb", 1.0, True))
    assert len(candidates(SearchProblem(space, table, target, (limit,)), scores)) == 1


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    return str(tmp_path / "fp32")


def test_the_command(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["quantize", model, str(run), "--calibration", "digits", "--calibration_images", "16", "--json",
               "--match_labels", "index", "--held_out_images", "100", "--rounding", "nearest"]  # fmt: skip
    chosen = [*command, "--search_space", "int2", "int8"]
    assert fliqs_hf_cli.main([*chosen, "--max_drop", "0"]) == 1  # no images can prove that nothing is lost
    out = capsys.readouterr().out
    refused = json.loads(out[out.index("{\n") :])
    assert "no model is written" in refused["error"] and len(refused["floor"]["trials"]) == 1
    assert not (run / "config.json").exists()
    assert fliqs_hf_cli.main([*chosen, "--max_drop", "99"]) == 0  # which any model meets: the cheapest is taken
    met = json.loads(capsys.readouterr().out)
    assert {entry["weight"] for entry in met["allocation"].values()} == {"int2"}
    assert all(trial["met"] and trial["images"] == 100 for trial in met["floor"]["trials"])
    assert len(met["floor"]["trials"]) > 1
    assert fliqs_hf_cli.main([*chosen, "--max_drop", "99", "--overwrite", "--floor_steps", "2"]) == 0
    assert len(json.loads(capsys.readouterr().out)["floor"]["trials"]) == 2  # the most and the least precise
    assert fliqs_hf_cli.main([*chosen, "--max_drop", "99", "--overwrite"]) == 0
    met = json.loads(capsys.readouterr().out)
    recorded = json.loads((run / "fliqs/results.json").read_text())["floor"]
    assert recorded["trials"] == met["floor"]["trials"] and recorded["max_drop"] == 0.99
    command = [word for word in command if word not in ("--search_space", "int2", "int8")]  # nothing is chosen
    given = ["--overwrite", "--weight_format", "int8", "--activation_format", "none", "--min_accuracy", "0.99"]
    assert fliqs_hf_cli.main([*command, *given]) == 1
    assert "the only allocation that is allowed" in json.loads(capsys.readouterr().out)["error"]
    assert json.loads((run / "fliqs/results.json").read_text())["floor"] == recorded  # what was there is still there
    assert fliqs_hf_cli.main([*command, "--overwrite", "--held_out", "digits"]) == 2
    assert "give --max_drop or --min_accuracy" in capsys.readouterr().err
    same = ["--max_drop", "1", "--held_out_split", "train[:30]", "--calibration_split", "train[:40]"]
    assert fliqs_hf_cli.main([*chosen, "--overwrite", *same]) == 2
    assert "images are held out" in capsys.readouterr().err
    uncalibrated = ["quantize", model, str(run), "--overwrite", "--max_drop", "1"]
    assert fliqs_hf_cli.main(uncalibrated) == 2 and "give some with --calibration" in capsys.readouterr().err


def test_recommend(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ["recommend", model, str(run), "--calibration", "digits", "--calibration_images", "16", "--match_labels",
               "index", "--search_space", "int4", "int8", "--held_out_images", "100"]  # fmt: skip

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recommend, "_times", interrupted)
        assert fliqs_hf_cli.main([*command, "--max_drop", "99"]) == 130
    assert not run.exists()
    capsys.readouterr()
    timed: dict[str, Any] = {}
    times = recommend._times
    monkeypatch.setattr(recommend, "_times", lambda models: timed.update(models) or times(models))
    assert fliqs_hf_cli.main([*command, "--max_drop", "99"]) == 0
    text = capsys.readouterr().out
    assert "safer" in text and "no faster model: nothing cheaper was tested" in text
    found = json.loads((run / "fliqs/recommendation.json").read_text())
    assert set(found) == {"fp32", "safer", "recommended"}
    assert found["fp32"]["bytes"] > found["safer"]["bytes"] > found["recommended"]["bytes"]
    assert all(entry["ms"] > 0 for entry in found.values())
    # What is timed and counted is what is on the disk: rotated, rounded by GPTQ.
    assert found["recommended"]["bytes"] == (run / "model.safetensors").stat().st_size
    written = ViTForImageClassification.from_pretrained(run).state_dict()
    of_timed = timed["recommended"].state_dict()
    assert list(of_timed) == list(written) and all(torch.equal(of_timed[name], written[name]) for name in written)
    assert (
        fliqs_hf_cli.main(["report", str(run)]) == 0
        and "recommendation.json" in (run / "fliqs/written.json").read_text()
    )
    capsys.readouterr()
    assert found["recommended"]["allocation"] == json.loads((run / "fliqs/allocation.json").read_text())
    assert fliqs_hf_cli.main([*command, "--overwrite", "--min_accuracy", "1", "--json"]) == 1
    assert "no model is written" in json.loads(capsys.readouterr().out)["error"]


def test_a_recommendation_says_what_is_not_faster() -> None:
    tested = {"bytes": 10**6, "accuracy": 0.8, "drop": 0.0, "highest_drop": 0.01, "met": True}
    found = {name: {**tested, "ms": ms} for name, ms in (("fp32", 9.0), ("recommended", 10.0), ("faster", 11.0))}
    said = recommend._text(Namespace(output="out"), found)
    assert "it is not faster than fp32 here" in said and "should be faster is not, on this device (+10.00 %" in said
    found["recommended"]["ms"] = 8.0
    found["faster"]["ms"] = 7.0
    assert "not faster" not in (said := recommend._text(Namespace(output="out"), found)) and "should be" not in said
