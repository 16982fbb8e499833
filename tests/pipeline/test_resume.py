"""Killed after any write, a run that is resumed ends with all that an uninterrupted one has."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure

from fliqs_hf.errors import BusyError, CheckpointError
from fliqs_hf.lock import locked
from fliqs_hf.pipeline import delivery, search
from fliqs_hf.pipeline.search import main, script
from fliqs_hf.report import run_figures
from tests.recipes.test_vit import write

#: The least that has all parts: fine-tuning, two passes of scores, search, training, a uniform model.
TINY: dict[str, Any] = {
    "finetune_steps": 2, "max_steps": 3, "save_steps": 2, "logging_steps": 1, "compare_uniform": ["int4"],
    "search_overrides": {"prior_images": 8, "explore_fraction": 0.5}, "max_train_samples": 32, "max_eval_samples": 16,
    "per_device_train_batch_size": 8, "eval_steps": 3, "load_best_model_at_end": True,
}  # fmt: skip
FRONT = {"target_bits": [3.0, 5.0]}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every run may choose its own precision."""
    draw_little(monkeypatch)
    AcceleratorState._reset_state(reset_partial_state=True)


def draw_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are written as ever, but empty: drawing takes longer than all the rest."""
    for name in ("allocation_figure", "cost_figure", "curves_figure", "policy_figure"):
        monkeypatch.setattr(run_figures, name, lambda *_: Figure(figsize=(0.5, 0.5)))


def run(*arguments: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    main([str(argument) for argument in arguments])


class Snapshots:
    """Copies of a folder as a kill would leave it: after every write, and before every rename."""

    def __init__(self, folder: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.kept, self.names = folder, kept, []  # type: ignore[var-annotated]
        self.calls = {name: getattr(os, name) for name in ("replace", "fsync")}
        monkeypatch.setattr(os, "replace", self.replace)
        monkeypatch.setattr(os, "fsync", self.fsync)
        self.remove = shutil.rmtree
        monkeypatch.setattr(shutil, "rmtree", self.rmtree)

    def take(self, name: str) -> None:
        if self.folder.exists():
            shutil.copytree(self.folder, self.kept / str(len(self.names)), ignore=shutil.ignore_patterns(".lock"))
            self.names.append(name)

    def inside(self, path: Any) -> bool:
        return self.folder in Path(path).parents

    def replace(self, source: Any, target: Any) -> None:
        if self.inside(target):
            self.take(f"before {Path(target).name}")
        self.calls["replace"](source, target)
        if self.inside(target):
            self.take(f"after {Path(target).name}")

    def fsync(self, descriptor: int) -> None:
        self.calls["fsync"](descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.suffix == ".jsonl" and self.inside(path):
            self.take(f"after a line of {path.name}")

    def rmtree(self, path: Any, *rest: Any, **more: Any) -> None:
        self.remove(path, *rest, **more)
        if self.inside(path):
            self.take(f"after removing {Path(path).name}")


TIMES = ("seconds", "seconds_per_step", "sensitivity_seconds", "checksum", "command", "resume", "output_dir")


def contents(folder: Path) -> dict[str, Any]:
    """All files but for times and paths; of report and card, full of them, that it is there and is not older."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in ("report.html", "README.md"):
            run = path.parent if path.name == "README.md" else path.parent.parent
            found[name] = path.stat().st_mtime_ns >= (run / "fliqs/results.json").stat().st_mtime_ns
        elif path.suffix == ".jsonl":
            found[name] = [
                {key: value for key, value in json.loads(line).items() if key not in TIMES}
                for line in path.read_text().splitlines()
            ]
        elif path.suffix == ".json" and isinstance(data := json.loads(path.read_text()), dict):
            found[name] = [(key, value) for key, value in data.items() if key not in TIMES]
        else:
            found[name] = path.read_bytes()
    return found


#: Some of the moments: the last of every kind after which something else is to be done.
MOMENTS = (
    "after step-00000002", "after fp32", "after sensitivity.json", "after a line of policy.jsonl",
    "before model.safetensors", "before config.json", "after config.json", "after uniform_int4.json",
    "after results.json", "after report.html",
)  # fmt: skip


def chosen(names: list[str]) -> list[int]:
    """The last of every kind."""
    last = {name: number for number, name in enumerate(names)}
    return sorted(last[name] for name in MOMENTS)


@pytest.mark.slow
def test_killed_after_any_write_nothing_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, **TINY, **FRONT)
    with monkeypatch.context() as patch:
        snapshots = Snapshots(tmp_path / "run", tmp_path / "kept", patch)
        run(file)
    whole = contents(tmp_path / "run")
    for name in (
        "fliqs/front.csv",
        "fliqs/front.png",
        "bits-5/fliqs/report.html",
        "bits-5/fliqs/figures/allocation.png",
        "bits-5/README.md",
        "fliqs/uniform_int4.json",
    ):
        assert name in whole
    assert not [name for name in whole if "state" in name or "/." in name or name.startswith(".")]
    for number in chosen(snapshots.names):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "kept" / str(number)).rename(tmp_path / "run")
        run(file, "--resume")
        found = contents(tmp_path / "run")
        assert found.keys() == whole.keys(), snapshots.names[number]
        for name in whole:
            assert found[name] == whole[name], (snapshots.names[number], name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        draw_little(patch)
        folder = tmp_path_factory.mktemp("finished")
        run(write(folder, **TINY))
        yield folder


def again(finished: Path, tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, **TINY), shutil.copytree(finished / "run", tmp_path / "run")


@pytest.mark.parametrize(
    "name",
    ["README.md", *(f"fliqs/{record}" for record in (
        "report.html", "figures", "figures/search.png", "allocation.json", "layers.json", "search_space.json",
        "uniform_int4.json",
    ))],
)  # fmt: skip
def test_what_a_finished_run_lacks_is_made(finished: Path, tmp_path: Path, name: str) -> None:
    file, folder = again(finished, tmp_path)
    whole = contents(folder)
    shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    run(file, "--resume")
    assert contents(folder) == whole


WEIGHTS, CONFIG = "fliqs/fp32/model.safetensors", "fliqs/fp32/config.json"
SETTINGS = "fliqs/settings.json"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "result: another digit": (
        lambda r: alter(r / "fliqs/results.json", '"correct": ', '"correct": 1'),
        "results.json",
    ),
    "result: cut off": (lambda r: os.truncate(r / "fliqs/results.json", 40), "results.json"),
    "result without a checkpoint": (lambda r: (r / "config.json").unlink(), "results.json is of a finished run"),
    "result without weights": (lambda r: (r / "model.safetensors").unlink(), "model.safetensors"),
    "result without settings": (
        lambda r: (r / "fliqs/settings.json").unlink(),
        "settings.json.*--overwrite_output_dir",
    ),
    "settings cut off": (lambda r: os.truncate(r / SETTINGS, 40), "settings.json.*--overwrite_output_dir"),
    "settings are a list": (
        lambda r: (r / SETTINGS).write_text("[]"),
        "settings.json.*--overwrite_output_dir",
    ),
    "fp32: a bit": (lambda r: bit(r / WEIGHTS), "fp32/model.safetensors is damaged.*remove"),
    "fp32: no weights": (lambda r: (r / WEIGHTS).unlink(), "fp32/model.safetensors is missing"),
    "fp32: no config": (lambda r: (r / "fliqs/fp32/config.json").unlink(), "fp32/config.json is missing"),
    "fp32: other config": (
        lambda r: alter(r / CONFIG, "gelu", "relu"),
        "fp32/config.json is damaged",
    ),
    "fp32: no checksums": (lambda r: (r / "fliqs/fp32/checksums.json").unlink(), "fp32/checksums.json is missing"),
    "fp32: empty": (lambda r: (shutil.rmtree(r / "fliqs/fp32"), (r / "fliqs/fp32").mkdir()), "fp32"),
}


def alter(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_named(finished: Path, tmp_path: Path, damage: Callable[[Path], Any], named: str) -> None:
    file, folder = again(finished, tmp_path)
    damage(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    with pytest.raises(CheckpointError, match=named):
        run(file, "--resume")
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before


@pytest.mark.parametrize("name", ["sensitivity.json", "uniform_int4.json"])
def test_records_of_an_unfinished_run_are_not_believed_if_damaged(finished: Path, tmp_path: Path, name: str) -> None:
    """Scores are measured again; an accuracy is not worth a training that nobody asked for."""
    file, folder = again(finished, tmp_path)
    whole = contents(folder)
    (folder / "fliqs/results.json").unlink()
    text = (folder / "fliqs" / name).read_text()
    number = max((word for word in text.split('"loss": ' if "uniform" in name else "\n")), key=len)[:12]
    alter(folder / "fliqs" / name, number, number.translate(str.maketrans("123456789", "234567891")))
    if name == "uniform_int4.json":
        with pytest.raises(CheckpointError, match=r"uniform_int4.json is damaged.*remove it"):
            run(file, "--resume")
        (folder / "fliqs" / name).unlink()
    run(file, "--resume")
    assert contents(folder) == whole


PHASES = {
    "fp32 evaluation": (search.Job, "evaluate"),
    "sensitivity": (search.Prior, "scores"),
    "packing": (delivery, "quantize"),
    "alternatives": (search, "measure_alternatives"),
    "result": (search, "RunResults"),
    "report": (search, "complete"),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_outside_of_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], phase: str, number: int
) -> None:
    where, name = PHASES[phase]
    original = getattr(where, name)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **more)

    monkeypatch.setattr(where, name, interrupted)
    before = signal.getsignal(number)
    file = write(tmp_path, **TINY | {"compare_uniform": None, "eval_steps": 0, "load_best_model_at_end": False})
    assert script([str(file)]) == 128 + number
    signal_name = signal.Signals(number).name
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by {signal_name}; add --resume to go on"
    assert signal.getsignal(number) is before
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_second_process_is_told_who_is_there(tmp_path: Path) -> None:
    file = write(tmp_path, **TINY)
    with locked(tmp_path / "run"), pytest.raises(BusyError, match=rf"run: process {os.getpid()} on .*, started 20"):
        run(file)
    assert not (tmp_path / "run").exists()
    with locked(tmp_path / "run" / "bits-5"), pytest.raises(BusyError, match="bits-5"):
        run(write(tmp_path, **TINY, **FRONT))
