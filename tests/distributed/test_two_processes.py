"""Two gloo processes: one policy, different samples, one result; and a crash that leaves no trace in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fliqs_hf.cost import trace_layers
from fliqs_hf.selection import SearchSpace, fisher_scores
from fliqs_hf.training.data import train_loader
from tests.helpers.models import tiny
from tests.recipes.test_vit import result_bytes, write
from tests.training.test_loop import Blobs

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def launch(folder: Path, *arguments: str, worker: str = "worker", more: dict[str, str] | None = None) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", f"tests.distributed.{worker}", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {"ACCELERATE_USE_CPU": "true"})}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if arguments[:1] in ((), ("-1",)) and run.returncode:
        raise AssertionError(run.stderr[-3000:])
    return run.returncode


def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("how", [["--clipped"], ["--fsdp"]], ids=["ddp with learned factors", "fsdp2"])
def test_ranks_agree_explore_apart_and_survive_a_crash(tmp_path: Path, how: list[str]) -> None:
    launch(tmp_path / "whole", "-1", *how)
    first, second = ranks(tmp_path / "whole")
    assert torch.equal(first["logits"], second["logits"]) and first["logits"].abs().max() > 0
    assert torch.equal(first["choice"], second["choice"])
    for name in first:
        if name.startswith("model.") or name == "factors":
            assert torch.equal(first[name], second[name]), name
    searching = slice(0, 12)  # 60 % of 20 steps
    assert not torch.equal(first["samples"][searching], second["samples"][searching])
    assert torch.equal(first["samples"][12:], second["samples"][12:])

    assert launch(tmp_path / "crash", "10", *how) != 0
    assert [path.name for path in (tmp_path / "crash" / "state").glob("step-*")] == ["step-00000008"]
    launch(tmp_path / "crash", "-1", "--resume", *how)
    resumed = ranks(tmp_path / "crash")
    for before, after in zip((first, second), resumed, strict=True):
        for name in before:
            expected = before[name][8:] if name == "samples" else before[name]
            assert torch.equal(after[name], expected), name


def recipe(file: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / "vit.py"), str(file), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def test_the_recipe_stops_and_goes_on_in_two_processes(tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher and both processes, as in a terminal; both must stop after the same step."""
    file = write(tmp_path, max_steps=120, finetune_steps=0)
    process = recipe(file)
    state = tmp_path / "run" / "fliqs/state"
    deadline = time.monotonic() + 120
    while not list(state.glob("step-*/meta.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not (tmp_path / "run" / "fliqs/results.json").exists(), output[-3000:]
    assert "stopped after step" in output, output[-3000:]
    for arguments in (["--resume"], ["--output_dir", str(tmp_path / "whole")]):
        process = recipe(file, *arguments)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output[-3000:]
    assert result_bytes(tmp_path / "run") == result_bytes(tmp_path / "whole")
    scores = json.loads((tmp_path / "whole" / "fliqs/sensitivity.json").read_text())
    assert scores["images"] == 64  # shared out: each process has measured half of them


@pytest.mark.parametrize("checkpointing", [False, True])
def test_parameters_without_a_gradient_do_not_stop_ddp(tmp_path: Path, checkpointing: bool) -> None:
    """DINOv2's mask token is one: images of a classifier are not masked."""
    sizes = {"patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    changes = {"model_type": "dinov2", "config_overrides": sizes, "gradient_checkpointing": checkpointing}
    file = write(tmp_path, finetune_steps=0, max_steps=4, **changes)
    process = recipe(file)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert (tmp_path / "run" / "fliqs/results.json").exists()


def test_batch_statistics_end_alike_and_scores_are_of_all_images(tmp_path: Path) -> None:
    """Every process has its own running statistics after a step; what goes on must be one model."""
    launch(tmp_path, worker="norms_worker")
    first, second = ranks(tmp_path)
    assert sum(name.endswith("running_mean") for name in first) > 3
    assert all(torch.equal(first[name], second[name]) for name in first)
    model = tiny("resnet")
    model.load_state_dict({name.removeprefix("model."): value for name, value in first.items() if name != "scores"})
    space = SearchSpace(trace_layers(model), ["int3", "e2m1"])
    batches = train_loader(Blobs(64), 8, 0, 0, 8, 0, 1, 0)  # the same 64 images
    alone = fisher_scores(model, batches, lambda x: model(x).logits, space)
    # Sums of float32 gradients in other batches and another order.
    torch.testing.assert_close(first["scores"], alone.decision_scores, rtol=1e-3, atol=1e-9)


def test_a_differentiable_search_has_one_result(tmp_path: Path) -> None:
    launch(tmp_path, worker="mixing_worker")
    first, second = ranks(tmp_path)
    assert (first["logits"] != 0).any()
    assert not torch.equal(first.pop("mixed by"), second.pop("mixed by"))  # each rank has Gumbel noise of its own
    assert all(torch.equal(first[name], second[name]) for name in first)
