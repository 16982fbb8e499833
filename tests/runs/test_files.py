"""The record of what a run folder owns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.formats import COMMON
from fliqs_hf.runs.files import RunFiles, is_run, kind_of
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.runs.folder import RunFolder


def record(folder: Path, *entries: Any) -> None:
    (folder / "fliqs").mkdir(exist_ok=True)
    (folder / "fliqs/written.json").write_text(json.dumps({"format_version": 2, "written": list(entries)}))


@pytest.mark.parametrize("entry", [
    "../config.json", "/etc/passwd", "notes.txt", "fliqs/fp32", "fliqs/fp32/../../x", "fliqs/fp32//x",
    "fliqs/figures/./x",
    "fliqs/figures/", "fliqs/state", "fliqs/state/x", "", "/", ".", "..", "../", "bits-3/config.json", "bits-../",
    "a/",
    "fliqs/written.json", "fp32/x", "results.json", "state/", "fliqs", "fliqs/", "fliqs//x", "fliqs/config.json",
    "fliqs/bits-3/", "fliqs/../config.json", "config.json/", "fliqs\\..\\x", "fliqs/fp32/x\0", ".tmp.config.json",
    "fliqs/uniform_x.json", "model.safetensors/x", "settings.json", 5, None, ["config.json"],
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
    "", "{", "[]", "5", '{"written": []}', '{"format_version": 1, "written": []}', '{"format_version": 2}',
    '{"format_version": true, "written": ["config.json"]}', '{"format_version": 2, "written": {"config.json": 1}}',
    '{"format_version": 3, "written": []}',
    "[" * 100_000, "\udcff",
])  # fmt: skip
def test_a_damaged_record_owns_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "fliqs").mkdir()
    (tmp_path / "fliqs/written.json").write_bytes(text.encode("utf-8", "surrogateescape"))
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
    assert seen == [{"fliqs/layers.json"}] and (tmp_path / "fliqs/layers.json").exists()
    with run.replacing("fp32") as draft:
        draft.mkdir()
        (draft / "model.safetensors").write_text("x")
    assert seen[1:] == [{"fliqs/layers.json", "fliqs/fp32/model.safetensors"}]
    run.append({"step": 1})
    run.append({"step": 2})
    expected = {"fliqs/layers.json", "fliqs/fp32/model.safetensors", "fliqs/metrics.jsonl"}
    assert len(seen) == 3 and run.files.listed() == expected


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write("settings.json", {})
    (tmp_path / "fliqs/results.json").write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        run.write("results.json", {})
    (tmp_path / "fliqs/fp32").mkdir()
    with run.replacing("fp32") as draft:
        draft.mkdir()
    with pytest.raises(ConfigError, match=r"notes\.txt is in the way"), run.replacing("fp32") as draft:  # noqa: PT012
        draft.mkdir()
        (tmp_path / "fliqs/fp32/notes.txt").write_text("mine")
    assert (tmp_path / "fliqs/results.json").read_text() == (tmp_path / "fliqs/fp32/notes.txt").read_text() == "mine"


def save(run: RunFolder, *names: str, text: str = "new") -> None:
    with run.files.model() as draft:
        for name in names:
            (draft / name).write_text(text)


def test_a_model_comes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is stopped: the files of one model with its config.json, or no config.json."""
    run, shards = RunFolder(tmp_path), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    old, new = ("config.json", "generation_config.json", *shards), ("config.json", "model.safetensors")
    moments = 0
    for name in ("replace", "unlink"):
        for count in range(8):
            save(run, *old, text="old")
            left = [count]

            def stop(original: Any, left: list[int], *arguments: Any, **more: Any) -> Any:
                if not left[0] and tmp_path in Path(arguments[0]).parents:
                    raise KeyboardInterrupt
                left[0] -= 1
                return original(*arguments, **more)

            where = os if name == "replace" else Path
            with monkeypatch.context() as patch:
                original = getattr(where, name)
                patch.setattr(where, name, lambda *a, o=original, c=left, **m: stop(o, c, *a, **m))
                try:
                    save(run, *new)
                except KeyboardInterrupt:
                    moments += 1
            there = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
            assert "config.json" not in there or there in (dict.fromkeys(old, "old"), dict.fromkeys(new, "new"))
            save(run, *new)
            assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "fliqs", "model.safetensors"]
            assert [path.name for path in (tmp_path / "fliqs").iterdir()] == ["written.json"]
            assert run.files.listed() == set(new) and run.files.holds_work
    assert moments > 6


def test_a_model_replaces_nothing_of_others(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save(run, "config.json", "model.safetensors", text="old")
    (tmp_path / "preprocessor_config.json").write_text("mine")
    before = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    for names, message in (
        (("config.json", "preprocessor_config.json"), "preprocessor_config.json is in the way"),
        (("config.json", "modeling_own.py"), "comes with 'modeling_own.py'"),
    ):
        with pytest.raises(ConfigError, match=message):
            save(run, *names)
        assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before


def test_links_are_left_alone(tmp_path: Path) -> None:
    """Even at a name that is listed: somebody moved the folder to another disk."""
    run, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"
    for name in ("fp32", "state"):
        (elsewhere / name / "step-00000001").mkdir(parents=True)
        (elsewhere / name / "model.safetensors").write_text("x")
    run.files.claim("config.json", "fliqs/fp32/model.safetensors", "fliqs/state/", "bits-3/")
    (elsewhere / "config.json").write_text("{}")
    for name in ("fp32", "state"):
        (run.records / name).symlink_to(elsewhere / name)
    (run.path / "config.json").symlink_to(elsewhere / "config.json")
    (run.path / "bits-3").symlink_to(elsewhere)
    record(elsewhere, "config.json")
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(ConfigError, match="in the way"):
        run.files.clear()
    for name in ("fliqs/fp32", "fliqs/state", "config.json", "bits-3"):
        run.files.discard(name)
    assert sorted(elsewhere.rglob("*")) == before
    (run.records / "fp32-state").mkdir()
    run.claim("fp32-state/")
    (run.records / "fp32-state" / "step-00000001").symlink_to(elsewhere)
    run.discard("fp32-state")
    assert sorted(elsewhere.rglob("*")) == before and not run.files.runs()


def test_records_in_a_link_are_not_ours(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.write("layers.json", [])
    run.records.rename(tmp_path / "elsewhere")
    run.records.symlink_to(tmp_path / "elsewhere")
    assert not is_run(run.path)
    for attempt in (
        run.files.clear,
        run.files.check,
        lambda: RunFolder(run.path).write("layers.json", [1]),
    ):
        with pytest.raises(ConfigError, match="fliqs is in the way"):
            attempt()
    assert json.loads((tmp_path / "elsewhere/layers.json").read_text()) == []


def test_an_emptied_folder_goes_and_others_stay(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.claim("state/", "fp32-state/", "figures/search.png")
    for name in ("state/step-00000005/meta.json", "state/best/model.safetensors", "state/.tmp.step-00000010/x",
                 "fp32-state/step-00000005/meta.json", "fp32-state/mine.txt", "figures/search.png"):  # fmt: skip
        (run.records / name).parent.mkdir(parents=True, exist_ok=True)
        (run.records / name).write_text("x")
    for name in ("state", "fp32-state", "figures"):
        run.discard(name)
    left = sorted(path.relative_to(run.records).as_posix() for path in run.records.rglob("*"))
    assert left == ["fp32-state", "fp32-state/mine.txt", "written.json"]
    assert run.files.listed() == set()


def test_an_interrupted_clearing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    for name in ("settings.json", "results.json", "allocation.json"):
        run.write(name, {})
    original = Path.unlink

    def once(self: Path, missing_ok: bool = False) -> None:
        if self.name == "results.json":
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", once)
        with pytest.raises(KeyboardInterrupt):
            RunFiles(tmp_path).clear()
    assert not (run.records / "allocation.json").exists() and (run.records / "results.json").exists()
    assert RunFiles(tmp_path).holds_work
    RunFiles(tmp_path).clear()
    assert not list(tmp_path.iterdir())


EARLIER = '{"command": "fliqs-hf search", "versions": {"fliqs-hf": "0.1.0", "torch": "2.13.0"}}'


@pytest.mark.parametrize("name", ["config.json", "written.json"])
def test_a_run_of_an_earlier_version_is_neither_replaced_nor_misread(tmp_path: Path, name: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / name).write_text(EARLIER if name == "config.json" else '{"format_version": 1, "written": []}')
    for attempt in (RunFiles(tmp_path).clear, RunFiles(tmp_path).check):
        with pytest.raises(ConfigError, match=r"a run of an earlier version .* choose another output folder"):
            attempt()
    with pytest.raises(CheckpointError, match=r"earlier version .* give .*checkpoint instead"):
        FinishedRun.read(tmp_path)
    assert not is_run(tmp_path)


@pytest.mark.parametrize("config", [
    "{}", "[]", '{"command": "x"}', '{"command": 1, "versions": 5}', '{"versions": {"fliqs-hf": "0.1.0"}}',
    '{"quantization_config": {"quant_method": "fliqs"}}',
])  # fmt: skip
def test_another_config_is_not_taken_for_an_earlier_version(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert RunFiles(tmp_path).listed() == set()
    with pytest.raises(ConfigError, match=r"config\.json is in the way"):
        RunFiles(tmp_path).clear()


def test_why_there_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a run folder nor that of a model"):
        FinishedRun.read(tmp_path)
    RunFolder(tmp_path).write("settings.json", {})
    with pytest.raises(CheckpointError, match=r"is not finished.*--resume"):
        FinishedRun.read(tmp_path)
    (tmp_path / "bits-3").mkdir()
    (tmp_path / "bits-3" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"several targets: give one of them, such as .*bits-3"):
        FinishedRun.read(tmp_path)


def test_names_of_every_uniform_format_are_known() -> None:
    for fmt in COMMON:
        kinds = [kind_of(f"fliqs/uniform_{fmt.name}{ending}") for ending in ("", ".json", "-state")]
        assert kinds == ["folder", "file", "states"]
    assert kind_of("fliqs/uniform_photos") is kind_of("notes.txt") is kind_of(".tmp.notes.txt") is None
    assert kind_of("uniform_int4") is kind_of("fliqs/config.json") is kind_of("results.json") is None
