"""The run folder's records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import CheckpointError, DiskError
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.selection import SearchSpace, Sensitivity
from tests.helpers.models import tiny


def test_scores_are_recorded_bit_for_bit(tmp_path: Path) -> None:
    space = SearchSpace(trace_layers(tiny("vit")), ["int4", "e2m1", "int8"])
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(len(space.decisions), 3, generator=generator) * 10.0 ** torch.tensor([0, -7, -30])
    measured, run = Sensitivity(scores, 64, 1.25, 2), RunFolder(tmp_path)
    assert run.sensitivity(space) is None
    run.begin(space.layers, space, measured)
    recorded = run.sensitivity(space)
    assert recorded is not None and torch.equal(recorded.decision_scores, scores)
    assert replace(recorded, decision_scores=scores) == measured
    assert run.sensitivity(SearchSpace(space.layers, ["int4", "int8"])) is None
    (run.records / "sensitivity.json").write_text("{")
    assert run.sensitivity(space) is None


def test_a_full_disk_spoils_no_record(tmp_path: Path) -> None:
    """The line that breaks off is dropped when the run goes on, as steps beyond the state are."""
    run = RunFolder(tmp_path)
    for step in (5, 10, 15):
        run.append({"step": step})
    with run.metrics.open("a") as file:
        file.write('{"step": 2')
    run.forget_after(10)
    assert run.metrics.read_text() == '{"step": 5}\n{"step": 10}\n'
    run.metrics.unlink()
    run.metrics.symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"cannot write .*metrics.jsonl: .*free some space"):
        run.append({"step": 20})


def test_only_the_last_line_may_have_broken_off(tmp_path: Path) -> None:
    """A whole line that cannot be read is damage, not what a stop leaves."""
    run = RunFolder(tmp_path)
    run.records.mkdir()
    for line in ('{"step": 1', "[]", "{}", '{"step": null}', "\x00\x00"):
        run.metrics.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(CheckpointError, match=r"metrics.jsonl is damaged.*remove the line"):
            run.forget_after(2)


def test_a_damaged_result_is_not_believed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_result("results.json") is None
    run.write_result("results.json", {"accuracy": {"top1": 0.91}, "n": (1, 2)})
    assert run.read_result("results.json") == {"accuracy": {"top1": 0.91}, "n": [1, 2]}
    whole = (tmp_path / "fliqs/results.json").read_text()
    for text in (whole.replace("0.91", "0.81"), whole[:-4], "[]", "{}", "", "[" * 100_000, whole.replace("n", "m")):
        (tmp_path / "fliqs/results.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"results.json is damaged.*remove it"):
            run.read_result("results.json")
