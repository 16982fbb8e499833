"""States: complete or absent, damaged ones refused by name, metrics that do not show where a run was stopped."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from fliqs_hf.errors import CheckpointError, DiskError
from fliqs_hf.training import Interrupted, train
from fliqs_hf.training.state import Best, load_state, save_state, states
from fliqs_hf.training.step import TrainingStep
from tests.helpers.models import tiny
from tests.training.test_loop import Blobs, Peak, StopError, config, same, stop_at, weights

META = {"config": "settings", "world_size": 1, "name": "test"}


def write(folder: Path, step: int = 4, value: float = 1.0, **meta: Any) -> Path:
    tensors = {"a": torch.full((3, 5), value), "b": torch.arange(7) + value}
    save_state(folder, step, tensors, {"0.exp_avg": tensors["a"] * 2}, {"policy": tensors["b"]}, {**META, **meta})
    return states(folder)[-1]


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[Any]]:
    loaded: list[Any] = []
    known, extra = load_state(path, lambda *tensors: loaded.extend(tensors), META)
    return known, extra, loaded


def test_a_state_comes_back_and_replaces_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 4, 1.0)
    path = write(tmp_path, 8, 2.0, seconds=1.5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008"]
    known, extra, (model, optimizer) = read(path)
    assert (known["step"], known["seconds"]) == (8, 1.5)
    assert torch.equal(extra["policy"], torch.arange(7) + 2.0)
    assert torch.equal(model["a"], torch.full((3, 5), 2.0)) and torch.equal(optimizer["0.exp_avg"], model["a"] * 2)


def flip(path: Path, position: float, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[min(int(position * len(data)), len(data) - 1)] ^= 1 << bit
    path.write_bytes(data)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def poison(file: Path) -> None:
    rewrite(file, lambda tensors: next(iter(tensors.values())).view(-1)[:1].fill_(math.nan))


def edit(file: Path, key: str, value: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}, indent=2))


FILES = ("model.safetensors", "optimizer.safetensors", "extra.safetensors", "meta.json", "checksums.json")
DAMAGES: dict[str, Callable[[Path, Path], Any]] = {
    **{f"{f}: bit": lambda state, _, f=f: flip(state / f, 0.9, 3) for f in FILES},
    **{f"{f}: bit in its header": lambda state, _, f=f: flip(state / f, 0.05, 0) for f in FILES},
    **{f"{f}: cut off": lambda state, _, f=f: os.truncate(state / f, (state / f).stat().st_size - 8) for f in FILES},
    **{f"{f}: empty": lambda state, _, f=f: os.truncate(state / f, 0) for f in FILES},
    **{f"{f}: missing": lambda state, _, f=f: (state / f).unlink() for f in FILES},
    **{f"{f}: longer": lambda state, _, f=f: (state / f).write_bytes((state / f).read_bytes() + b"x") for f in FILES},
    **{f"{f}: of another step": lambda state, other, f=f: shutil.copy(other / f, state / f) for f in FILES},
    **{f"{f}: a folder": lambda state, _, f=f: (os.unlink(state / f), (state / f).mkdir()) for f in FILES},
    **{f"{f}: NaN": lambda state, _, f=f: poison(state / f) for f in FILES[:3]},
    "two files exchanged": lambda state, _: (
        os.rename(state / FILES[0], state / "x"), os.rename(state / FILES[1], state / FILES[0]),
        os.rename(state / "x", state / FILES[1]),
    ),
    "a tensor less": lambda state, _: rewrite(state / FILES[0], lambda tensors: tensors.pop("b")),
    "another step inside": lambda state, _: edit(state / "meta.json", "step", 5),
    "other settings inside": lambda state, _: edit(state / "meta.json", "config", "other"),
    "more seconds inside": lambda state, _: edit(state / "meta.json", "seconds", 9),
    "the wrong name": lambda state, _: state.rename(state.with_name("step-00000005")),
    "the name of another one": lambda state, other: (shutil.rmtree(state), shutil.copytree(other, state)),
    "no number": lambda state, _: state.rename(state.with_name("step-four")),
    "a short number": lambda state, _: state.rename(state.with_name("step-4")),
    "a file": lambda state, _: (shutil.rmtree(state), state.write_text("")),
    "empty": lambda state, _: (shutil.rmtree(state), state.mkdir()),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_no_damage_is_accepted(tmp_path: Path, damage: Callable[[Path, Path], Any]) -> None:
    state = write(tmp_path / "state", 4, 1.0, seconds=1.0)
    other = write(tmp_path / "other", 8, 2.0, seconds=2.0)
    damage(state, other)
    (found,) = states(tmp_path / "state")
    loaded: list[Any] = []
    with pytest.raises(CheckpointError, match=found.name):
        load_state(found, lambda *tensors: loaded.append(tensors), META)
    assert not loaded


def test_every_single_bit_of_what_describes_a_state_matters(tmp_path: Path) -> None:
    state = write(tmp_path)
    for name in ("meta.json", "checksums.json"):
        whole = (state / name).read_bytes()
        for position in range(len(whole)):
            flip(state / name, (position + 0.5) / len(whole), position % 8)
            assert (state / name).read_bytes()[position] != whole[position]
            with pytest.raises(CheckpointError):
                read(state)
            (state / name).write_bytes(whole)
    read(state)


def test_a_damaged_state_is_not_trained_with(tmp_path: Path) -> None:
    """Nor silently trained again: it is named, with what to do."""
    accelerator, model = Accelerator(cpu=True), tiny("vit")
    with pytest.raises(StopError):
        train(model, Blobs(50), config(), accelerator, state_folder=tmp_path, on_log=stop_at(6))
    (states(tmp_path)[-1] / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000004.*meta.json is missing; remove that folder"):
        train(model, Blobs(50), config(), accelerator, state_folder=tmp_path, resume=True)


@pytest.mark.parametrize("when", ["before it is renamed", "in the second file"])
def test_a_state_that_is_not_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """It gets its name by one rename, at which it is whole: a copy would show it in parts."""
    write(tmp_path, 4)
    rename, seen = os.replace, []

    def dies(source: Any, target: Any) -> None:
        if Path(target).name == "step-00000008":
            seen.append(sorted(path.name for path in Path(source).iterdir()))
            raise KeyboardInterrupt
        rename(source, target)

    def write_less(tensors: Any, file: Path) -> None:
        if file.name == "optimizer.safetensors":
            raise KeyboardInterrupt
        save_file(tensors, file)

    if when == "in the second file":
        monkeypatch.setattr("fliqs_hf.training.state.save_file", write_less)
    else:
        monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 8)
    assert seen == ([] if when == "in the second file" else [sorted(FILES)])
    assert [path.name for path in states(tmp_path)] == ["step-00000004"]
    monkeypatch.undo()
    assert read(states(tmp_path)[-1])[0]["step"] == 4


def test_disk_errors_of_a_state_say_what_happened(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    with pytest.raises(DiskError, match="a file stands where a folder should be") as caught:
        write(tmp_path / "state")
    assert "space" not in str(caught.value)


class Changing:
    """Metrics of its own until step 7, as a search has. Implements `StepHook`."""

    def begin_step(self, step: int) -> list[Any]:
        return [lambda: None]

    def end_step(self, step: int, quality: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"reward": quality[0], "entropy": torch.tensor(step / 3)} if step < 7 else {}

    def settled(self, step: int) -> bool:
        return True

    def log(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


@pytest.fixture(scope="module")
def uninterrupted() -> list[str]:
    lines: list[dict[str, Any]] = []
    settings = config(logging_steps=5, save_steps=3)
    train(tiny("vit"), Blobs(50), settings, Accelerator(cpu=True), hook=Changing(), on_log=lines.append)
    return [json.dumps({k: v for k, v in line.items() if k != "seconds"}) for line in lines]


@pytest.mark.parametrize("stop", range(1, 13))
def test_metrics_do_not_show_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, uninterrupted: list[str]
) -> None:
    """At every step: those that end a line, that a state is due after, and all others."""
    accelerator, lines = Accelerator(cpu=True), []
    settings = config(logging_steps=5, save_steps=3)
    take = TrainingStep.take

    def with_signal(self: TrainingStep, step: int) -> Any:
        if step + 1 == stop:
            os.kill(os.getpid(), 15)
        return take(self, step)

    monkeypatch.setattr(TrainingStep, "take", with_signal)
    with pytest.raises(Interrupted) as stopped:
        train(
            tiny("vit"), Blobs(50), settings, accelerator, hook=Changing(), state_folder=tmp_path, on_log=lines.append
        )
    assert stopped.value.status == 143 and str(stopped.value) == f"stopped after step {stop}"
    monkeypatch.undo()
    train(
        tiny("vit", seed=3), Blobs(50), settings, accelerator, hook=Changing(), state_folder=tmp_path,
        on_log=lines.append, resume=True,
    )  # fmt: skip
    assert [json.dumps({k: v for k, v in line.items() if k != "seconds"}) for line in lines] == uninterrupted
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)


def test_means_are_of_the_steps_that_have_the_metric(uninterrupted: list[str]) -> None:
    first, second, third = (json.loads(line) for line in uninterrupted)
    assert first["entropy"] == pytest.approx(sum(range(5)) / 3 / 5, rel=1e-6)  # float32 sums
    assert second["entropy"] == pytest.approx((5 + 6) / 3 / 2, rel=1e-6)
    assert "entropy" not in third and "loss" in third


def trained(folder: Path, score: Any, **more: Any) -> nn.Module:
    settings = config(eval_steps=3, keep_best=True)
    return train(
        tiny("vit"), Blobs(50), settings, Accelerator(cpu=True), score=score, state_folder=folder, **more
    )  # fmt: skip


BEST: dict[str, Callable[[Path], Any]] = {
    "bit": lambda file: flip(file, 0.7, 2),
    "bit in the header": lambda file: flip(file, 20 / file.stat().st_size, 0),
    "NaN": poison,
    "cut off": lambda file: os.truncate(file, file.stat().st_size - 4),
    "lost": lambda file: file.unlink(),
    "no score": lambda file: save_file(load_file(file), file),
    "a worse one": lambda file: Best(file.parent).offer(-9.0, 3, tiny("vit", seed=7)),
}


@pytest.mark.parametrize("damage", BEST.values(), ids=BEST)
def test_damaged_best_weights_are_not_returned(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    with pytest.raises(StopError):
        trained(tmp_path, Peak([3, 6, 9], 3), on_log=stop_at(10))
    damage(tmp_path / "best" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"best.*remove the folder {tmp_path}, and --resume trains again"):
        trained(tmp_path, Peak([9, 12], 3), resume=True)
    shutil.rmtree(tmp_path)
    whole = Peak([3, 6, 9, 12], 3)
    assert same(weights(trained(tmp_path, whole, resume=True)), whole.seen[3])


def test_best_weights_of_a_dropped_future_are_not_inherited(tmp_path: Path) -> None:
    """Kept after the last state: the steps come again, and offer them again."""
    with pytest.raises(StopError):
        trained(tmp_path, Peak([3], 3), on_log=stop_at(3))
    assert not states(tmp_path) and (tmp_path / "best").exists()
    again = Peak([3, 6, 9, 12], 9)
    assert same(weights(trained(tmp_path, again, resume=True)), again.seen[9])
