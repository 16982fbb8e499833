"""Two gloo processes: one policy, different samples, one result; and a crash that leaves no trace in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed


def launch(folder: Path, *arguments: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.distributed.worker", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if arguments[0] == "-1" and run.returncode:
        raise AssertionError(run.stderr[-3000:])
    return run.returncode


def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


def test_ranks_agree_explore_apart_and_survive_a_crash(tmp_path: Path) -> None:
    launch(tmp_path / "whole", "-1")
    first, second = ranks(tmp_path / "whole")
    assert torch.equal(first["logits"], second["logits"]) and first["logits"].abs().max() > 0
    assert torch.equal(first["choice"], second["choice"])
    for name in first:
        if name.startswith("model."):
            assert torch.equal(first[name], second[name]), name
    searching = slice(0, 12)  # 60 % of 20 steps
    assert not torch.equal(first["samples"][searching], second["samples"][searching])
    assert torch.equal(first["samples"][12:], second["samples"][12:])

    assert launch(tmp_path / "crash", "10") != 0
    assert [path.name for path in (tmp_path / "crash" / "state").glob("step-*")] == ["step-00000008"]
    launch(tmp_path / "crash", "-1", "--resume")
    resumed = ranks(tmp_path / "crash")
    for before, after in zip((first, second), resumed, strict=True):
        for name in before:
            expected = before[name][8:] if name == "samples" else before[name]
            assert torch.equal(after[name], expected), name
