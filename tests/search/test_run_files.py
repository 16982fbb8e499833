"""The record of what a run folder owns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import COMMON
from fliqs_hf.search.run import RunFolder
from fliqs_hf.search.run_files import RunFiles, kind_of


def record(folder: Path, *entries: Any) -> None:
    (folder / "written.json").write_text(json.dumps({"format_version": 1, "written": list(entries)}))


@pytest.mark.parametrize("entry", [
    "../config.json", "/etc/passwd", "notes.txt", "checkpoint", "checkpoint/../../x", "checkpoint//x", "figures/./x",
    "figures/", "state", "state/x", "", "/", ".", "..", "../", "bits-3/results.json", "bits-../", "a/", "written.json",
    "checkpoint\\..\\x", "checkpoint/x\0", ".tmp.config.json", "uniform_x.json", 5, None, ["config.json"],
])  # fmt: skip
def test_a_record_names_nothing_else(tmp_path: Path, entry: Any) -> None:
    """One that was changed or made by somebody else cannot have files removed that runs do not write."""
    record(tmp_path, "config.json", entry)
    (tmp_path / "config.json").write_text("{}")
    before = sorted(path.name for path in tmp_path.iterdir())
    for attempt in (RunFiles(tmp_path).listed, RunFiles(tmp_path).clear, RunFolder(tmp_path).files.check):
        with pytest.raises(ConfigError, match=r"written\.json is no record"):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", [
    "", "{", "[]", "5", '{"written": []}', '{"format_version": 2, "written": []}', '{"format_version": 1}',
    '{"format_version": true, "written": ["config.json"]}', '{"format_version": 1, "written": {"config.json": 1}}',
    "[" * 100_000, "\udcff",
])  # fmt: skip
def test_a_damaged_record_owns_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "written.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no record"):
        RunFiles(tmp_path).clear()
    assert (tmp_path / "config.json").exists()


def test_what_is_written_is_listed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two leaves a name without a file, never a file without a name."""
    run = RunFolder(tmp_path)
    original = RunFiles._write
    seen: list[set[str]] = []
    monkeypatch.setattr(
        RunFiles, "_write", lambda self, entries: seen.append(set(entries)) or original(self, seen[-1])
    )
    run.write("layers.json", [])
    assert seen == [{"layers.json"}] and (tmp_path / "layers.json").exists()
    with run.replacing("checkpoint") as draft:
        draft.mkdir()
        (draft / "model.safetensors").write_text("x")
    assert seen[1:] == [{"layers.json", "checkpoint/model.safetensors"}]
    run.append({"step": 1})
    run.append({"step": 2})
    assert len(seen) == 3 and run.files.listed() == {"layers.json", "checkpoint/model.safetensors", "metrics.jsonl"}


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write("config.json", {})
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        run.write("results.json", {})
    (tmp_path / "checkpoint").mkdir()
    with run.replacing("checkpoint") as draft:
        draft.mkdir()
    with pytest.raises(ConfigError, match=r"notes\.txt is in the way"), run.replacing("checkpoint") as draft:  # noqa: PT012
        draft.mkdir()
        (tmp_path / "checkpoint" / "notes.txt").write_text("mine")
    assert (tmp_path / "results.json").read_text() == (tmp_path / "checkpoint" / "notes.txt").read_text() == "mine"


def test_links_are_left_alone(tmp_path: Path) -> None:
    """Even at a name that is listed: somebody moved the folder to another disk."""
    run, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    for name in ("checkpoint", "state"):
        (elsewhere / name / "step-00000001").mkdir(parents=True)
        (elsewhere / name / "model.safetensors").write_text("x")
    run.files.claim("config.json", "checkpoint/model.safetensors", "state/", "bits-3/")
    (elsewhere / "config.json").write_text("{}")
    for name in ("checkpoint", "state", "config.json"):
        (run.path / name).symlink_to(elsewhere / name)
    (run.path / "bits-3").symlink_to(elsewhere)
    record(elsewhere, "config.json")
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(ConfigError, match="in the way"):
        run.files.clear()
    for name in ("checkpoint", "state", "config.json", "bits-3"):
        run.files.discard(name)
    assert sorted(elsewhere.rglob("*")) == before
    (run.path / "fp32-state").mkdir()
    run.files.claim("fp32-state/")
    (run.path / "fp32-state" / "step-00000001").symlink_to(elsewhere)
    run.files.discard("fp32-state")
    assert sorted(elsewhere.rglob("*")) == before and not run.files.runs()


def test_an_emptied_folder_goes_and_others_stay(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.files.claim("state/", "fp32-state/", "figures/search.png")
    for name in ("state/step-00000005/meta.json", "state/best/model.safetensors", "state/.tmp.step-00000010/x",
                 "fp32-state/step-00000005/meta.json", "fp32-state/mine.txt", "figures/search.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in ("state", "fp32-state", "figures"):
        run.files.discard(name)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["fp32-state", "fp32-state/mine.txt", "written.json"]
    assert run.files.listed() == set()


def test_an_interrupted_clearing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier version wrote no record, and what tells its runs, the config, has gone already."""
    config = {"command": "fliqs-hf search", "versions": {"fliqs-hf": "0.1.0", "torch": "2.13.0"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "results.json").write_text("{}")
    original = Path.unlink

    def once(self: Path, missing_ok: bool = False) -> None:
        if self.name == "results.json":
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            RunFiles(tmp_path).clear()
    assert not (tmp_path / "config.json").exists() and (tmp_path / "results.json").exists()
    assert RunFiles(tmp_path).holds_work
    RunFiles(tmp_path).clear()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", [
    "{}", "[]", '{"command": "x"}', '{"command": "x", "versions": {"torch": "2"}}', '{"command": 1, "versions": 5}',
    '{"versions": {"fliqs-hf": "0.1.0"}}', '{"quantization_config": {"quant_method": "fliqs"}}',
])  # fmt: skip
def test_another_config_is_not_taken_for_an_earlier_version(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "results.json").write_text("{}")
    assert RunFiles(tmp_path).listed() == set()
    with pytest.raises(ConfigError, match=r"config\.json is in the way"):
        RunFiles(tmp_path).clear()


def test_names_of_every_uniform_format_are_known() -> None:
    for fmt in COMMON:
        kinds = [kind_of(f"uniform_{fmt.name}{ending}") for ending in ("", ".json", "-state")]
        assert kinds == ["folder", "file", "states"]
    assert kind_of("uniform_photos") is kind_of("notes.txt") is kind_of(".tmp.notes.txt") is None
