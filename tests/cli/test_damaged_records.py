"""Every record that a command reads, replaced by something else: a typed error in one line, and no endless reading."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fliqs_hf import checksums
from fliqs_hf.baselines import multi_trial
from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import BusyError, CheckpointError, ConfigError, FliqsError
from fliqs_hf.hf.publication import publication
from fliqs_hf.json_file import MAX_BYTES
from fliqs_hf.lock import NAME, locked
from fliqs_hf.pipeline.compare_table import Table
from fliqs_hf.report.run_report import write_report
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training.models import read_classifier
from fliqs_hf.training.state import Best, load_state, save_state
from fliqs_hf_cli import main
from tests.helpers.models import tiny
from tests.helpers.networks import LONE
from tests.helpers.runs import write_run


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, MAX_BYTES + 1)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "nested": lambda path: path.write_text("[" * 100_000 + "]" * 100_000 + "\n"),
    "nested objects": lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000 + "\n"),
    "a list": lambda path: path.write_text("[1]\n"),
    "a number": lambda path: path.write_text("1e999\n"),
    "of another encoding": lambda path: path.write_bytes('{"a": "é"}\n'.encode("latin-1")),
    "larger than any": sparse,
    "a pipe": pipe,
}
#: To publish: JSON in which nothing is a path.
HARMLESS = (DAMAGES["a list"], DAMAGES["a number"])
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)

#: Read by `report`, and of these by `inspect` and `push`:
RECORDS = (
    *(
        f"fliqs/{name}.json"
        for name in ("settings", "results", "validation", "layers", "allocation", "search_space", "sensitivity")
    ),
    "fliqs/metrics.jsonl", "fliqs/policy.jsonl", "config.json",
)  # fmt: skip
PUBLISHED = (
    *(f"fliqs/{name}.json" for name in ("settings", "results", "layers", "allocation")),
    "fliqs/metrics.jsonl", "config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    write_run(folder)
    write_report(folder)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Runs a command. Returns: its one line."""
    status = main([*map(str, arguments), "--json"])
    shown = capsys.readouterr()
    message = str(json.loads(shown.out)["error"])
    kind = message.partition(":")[0]
    assert status == (1 if kind == "CheckpointError" else 2), message
    assert issubclass(getattr(__import__("fliqs_hf.errors").errors, kind), FliqsError), message
    assert len(message) < 1000 and "Traceback" not in shown.err
    return message


@damages
@pytest.mark.parametrize("record", RECORDS)
def test_a_report_of_damaged_records_is_refused(
    run: Path, record: str, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    page = (run / "fliqs/report.html").read_bytes()
    damage(run / record)
    refused(capsys, "report", run)
    assert (run / "fliqs/report.html").read_bytes() == page


@damages
@pytest.mark.parametrize("command", ["inspect", "estimate", "validate", "quantize"])
def test_the_config_of_a_checkpoint(
    run: Path, damage: Callable[[Path], object], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"validate": [run, "--dataset_name", "digits"], "quantize": [run.parent / "output"]}.get(command, [])
    damage(run / "config.json")
    assert "config" in refused(capsys, command, run, *more)


@damages
@pytest.mark.parametrize("record", PUBLISHED)
def test_what_would_be_published(run: Path, record: str, damage: Callable[[Path], object]) -> None:
    damage(run / record)
    if record == "fliqs/metrics.jsonl" and damage in HARMLESS:
        return
    with pytest.raises(FliqsError):
        publication(FinishedRun.read(run))


@damages
def test_another_record_of_the_checkpoint_that_would_be_published(run: Path, damage: Callable[[Path], object]) -> None:
    damage(run / "preprocessor_config.json")
    if damage in HARMLESS:
        return
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        publication(FinishedRun.read(run))


@damages
def test_a_lock_that_is_none(run: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]) -> None:
    damage(run / NAME)
    assert "is in the way" in refused(capsys, "report", run)


@pytest.mark.parametrize("pid", ["1" * 400, "1e999", "[]", "-5", '"x"', "null"])
def test_a_lock_of_an_impossible_process(tmp_path: Path, pid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from filelock import FileLock

    monkeypatch.setattr("fliqs_hf.lock._GRACE_S", 0.0)
    lock = FileLock(tmp_path / NAME)
    lock.acquire()
    (tmp_path / NAME).write_text(f'{{"pid": {pid}, "host": "{socket.gethostname()}"}}')
    with pytest.raises(BusyError, match="another process"), locked(tmp_path):
        pass
    lock.release()


@damages
def test_the_record_of_what_a_run_wrote(
    run: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "fliqs/written.json")
    before = sorted(run.rglob("*"))
    assert "written.json is no record" in refused(capsys, "report", run)
    assert sorted(run.rglob("*")) == before


@damages
def test_results_that_a_resumed_run_believes(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    run = RunFolder(tmp_path)
    run.write_result("results.json", {"a": 1})
    assert run.read_result("results.json") == {"a": 1}
    damage(tmp_path / "fliqs/results.json")
    with pytest.raises(CheckpointError, match="results"):
        run.read_result("results.json")


@damages
def test_steps_on_record(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    run = RunFolder(tmp_path)
    run.append({"step": 1, "seconds": 2.0})
    assert run.seconds() == 2.0
    damage(run.metrics)
    for read in (run.seconds, lambda: run.forget_after(1)):
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
            read()


@damages
@pytest.mark.parametrize("record", ["meta.json", checksums.NAME])
def test_training_states(tmp_path: Path, record: str, damage: Callable[[Path], object]) -> None:
    tensors = {"a": torch.ones(2)}
    save_state(tmp_path, 1, tensors, tensors, tensors, {})
    damage(tmp_path / "step-00000001" / record)
    with pytest.raises(CheckpointError, match=r"cannot be read.*--resume trains again"):
        load_state(tmp_path / "step-00000001", lambda *_: None, {})
    if record == "meta.json" and damage is not pipe and damage is not sparse:  # also by who writes checksums
        checksums.seal_folder(tmp_path / "step-00000001")
        with pytest.raises(CheckpointError, match=r"cannot be read.*--resume trains again"):
            load_state(tmp_path / "step-00000001", lambda *_: None, {})


def test_checksums_of_files_elsewhere_are_not_made(tmp_path: Path) -> None:
    for name in ("/dev/zero", "../outside", "sub"):
        (tmp_path / "state/sub").mkdir(parents=True, exist_ok=True)
        (tmp_path / "outside").write_text("x")
        (tmp_path / "state" / checksums.NAME).write_text(json.dumps(checksums.sealed({name: "0-0"})))
        with pytest.raises(CheckpointError, match="is missing"):
            checksums.check_folder(tmp_path / "state")


@pytest.mark.parametrize("header", ["[" * 100_000, "5", "[1]", '{"score": 1}'])
def test_best_weights_of_another_header(tmp_path: Path, header: str) -> None:
    from safetensors.torch import save_file

    best = Best(tmp_path)
    save_file({"weight": torch.ones(2)}, best.file, metadata={"best": header})
    with pytest.raises(CheckpointError, match="the best weights"):
        best.resume({"score": 0.5, "step": 1})


@damages
def test_the_journal_of_trials(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    space = SearchSpace(LONE, "int2,int4,int8")
    journal = tmp_path / "journal.jsonl"

    def search() -> None:
        multi_trial(
            SearchProblem(space, CostTable(LONE, space.formats), Target.of(target_bits=4)),
            lambda *_: 0.0,
            1,
            journal=journal,
        )

    search()
    head = journal.read_bytes().splitlines(keepends=True)[0]
    damage(journal)
    with pytest.raises(CheckpointError, match=r"cannot (be )?read"):
        search()
    if damage not in (pipe, sparse):  # below a head that is right
        journal.write_bytes(head + journal.read_bytes())
        with pytest.raises(CheckpointError, match=r"cannot (be )?read"):
            search()


@damages
def test_the_table_of_a_comparison(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = tmp_path / "table.csv"
    damage(path)
    with pytest.raises(CheckpointError, match=r"table\.csv"):
        Table(path, {})
    if damage not in (pipe, sparse):
        path.write_bytes(b"# settings: " + path.read_bytes())
        with pytest.raises(CheckpointError, match=r"table\.csv"):
            Table(path, {})


@damages
@pytest.mark.parametrize("record", ["config.json", "preprocessor_config.json"])
def test_models_that_a_recipe_reads(
    run: Path, record: str, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    model = run.parent / "model"
    tiny("vit").save_pretrained(model)
    shutil.copy(run / "preprocessor_config.json", model)
    damage(model / record)
    with pytest.raises(ConfigError):
        read_classifier(model_name_or_path=str(model))
    refused(capsys, "quantize", model, run.parent / "output")
