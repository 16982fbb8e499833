"""The run folder's records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import TrainingError
from fliqs_hf.search import SearchSpace, Sensitivity
from fliqs_hf.search.run import RunFolder
from tests.models import tiny


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
    (tmp_path / "sensitivity.json").write_text("{")
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
    for path, attempt in (
        ("metrics.jsonl", lambda: run.append({"step": 20})),
        (".results.json.tmp", lambda: run.write("results.json", {})),
    ):
        (tmp_path / path).unlink(missing_ok=True)
        (tmp_path / path).symlink_to("/dev/full")
        with pytest.raises(TrainingError, match=r"cannot write .*free some space and resume"):
            attempt()
    assert not (tmp_path / "results.json").exists()
