"""`validate`, `report` and `compare` replace only what they wrote, and say so before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.cli import validate as validating
from fliqs_hf.pipeline import compare as comparing
from fliqs_hf_cli import main
from tests.helpers.outputs import contents, fill, refused
from tests.helpers.runs import write_run


@pytest.mark.parametrize("name", [
    "foreign.html", "foreign.md", "foreign.json", "new/deep.html", "folder.html", "{photos}/new.json",
    "{fp32}/new.json", "{run}/config.json", "{run}/README.md", "{run}/fliqs/results.json", "{run}/fliqs/report.html",
    "{run}/fliqs/written.json", "{run}/fliqs/validation.md/x.md", "{run}/model.safetensors",
    "/proc/new.html", "{tmp}/" + 300 * "x" + ".md",
])  # fmt: skip
def test_validate_checks_its_outputs_first(
    fp32: Path, photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(validating, "to_validate", None)
    run = shutil.copytree(packed, tmp_path / "run")
    before = fill(tmp_path, "foreign.html", "foreign.md", "foreign.json", "folder.html/x")
    output = tmp_path / name.format(photos=photos, fp32=fp32, run=run, tmp=tmp_path)
    arguments = ["validate", str(fp32), str(run), "--dataset_name", str(photos), "--output", str(tmp_path / "ok.html")]
    assert str(output) in refused(capsys, *arguments, str(output))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["validation.json", "validation.html"])
def test_a_foreign_validation_stays(
    fp32: Path, photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(validating, "to_validate", None)
    run = shutil.copytree(packed, tmp_path / "run")
    before = fill(run, f"fliqs/{name}")
    assert f"{name} is in the way" in refused(capsys, "validate", str(fp32), str(run), "--dataset_name", str(photos))
    assert contents(run) == before


def test_an_earlier_validation_is_replaced(fp32: Path, photos: Path, packed: Path, tmp_path: Path) -> None:
    """In the run folder and elsewhere, in every form."""
    run = shutil.copytree(packed, tmp_path / "run")
    outputs = [str(tmp_path / f"page{ending}") for ending in (".html", ".md", ".json")]
    for limit in ("90", "99"):
        arguments = ["--dataset_name", str(photos), "--max_drop", limit, "--output", *outputs]
        assert main(["validate", str(fp32), str(run), *arguments]) == 0
        for path in (tmp_path / "page.json", run / "fliqs/validation.json"):
            assert json.loads(path.read_text())["gate"]["max_drop"] == float(limit) / 100
    assert main(["quantize", str(fp32), str(run), "--overwrite"]) == 0
    assert not (run / "fliqs/validation.json").exists()


def test_an_interrupted_write_leaves_the_earlier_result(
    fp32: Path, photos: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(packed, tmp_path / "run")
    output = tmp_path / "page.md"
    arguments = ["validate", str(fp32), str(run), "--dataset_name", str(photos), "--output", str(output)]
    assert main(arguments) == 0
    before = contents(tmp_path)
    for file in (output, run / "fliqs/validation.json"):
        original = Path.write_text

        def broken(self: Path, text: str, *more: Any, file: Path = file, original: Any = original, **kw: Any) -> int:
            if self.name.endswith(file.name):
                original(self, text[:10], *more, **kw)
                raise KeyboardInterrupt
            return int(original(self, text, *more, **kw))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", broken)
            assert main([*arguments, "--max_drop", "50"]) == 130
        assert (file.read_bytes(), [path.name for path in tmp_path.glob(".tmp*")]) == (
            before[str(file.relative_to(tmp_path))], [],
        )  # fmt: skip


@pytest.mark.parametrize("name", ["out.csv", "out.md", "out.png", "out.multi-trial-optuna-3-0.jsonl", ".out.csv.lock"])
def test_compare_takes_no_foreign_file_for_its_own(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(comparing, "Comparison", None)
    before = fill(tmp_path, name)
    output = str(tmp_path / "out.csv")
    assert name in refused(capsys, "compare", str(fp32), "--dataset_name", "digits", "--output", output)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("output", ["{fp32}/out.csv", "{photos}/out.csv", "/proc/out.csv", "{tmp}/table.md", ""])
def test_compare_checks_its_output_first(
    fp32: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    output: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(comparing, "Comparison", None)
    monkeypatch.chdir(tmp_path)
    path = output.format(fp32=fp32, photos=photos, tmp=tmp_path)
    assert "Error" in refused(capsys, "compare", str(fp32), "--dataset_name", str(photos), "--output", path)
    assert not (Path(path).is_file() or list(tmp_path.iterdir()))


@pytest.mark.parametrize("name", ["fliqs/figures/search.png", "fliqs/figures"])
def test_validate_checks_the_places_of_the_report_first(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "run"
    write_run(run)
    shutil.rmtree(run / "fliqs/figures")
    monkeypatch.setattr(validating, "load_model", None)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("of somebody else")
    message = refused(capsys, "validate", str(fp32), str(run), "--dataset_name", "digits")
    assert f"{run / name} is in the way" in message
    assert (run / name).read_text() == "of somebody else"


@pytest.mark.parametrize(
    "name", ["README.md", "fliqs/report.html", "fliqs/figures/allocation.png", "fliqs/figures/search.png"]
)
def test_a_foreign_report_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "fliqs/figures")
    for each in ("written.json", "report.html"):
        (tmp_path / "fliqs" / each).unlink()
    before = fill(tmp_path, name)
    assert f"{name} is in the way" in refused(capsys, "report", str(tmp_path))
    left = contents(tmp_path)
    left.pop("fliqs/written.json", None)
    assert left == before
