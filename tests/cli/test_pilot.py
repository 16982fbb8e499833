"""A pilot as a user walks it: quantize, report, validate, push; what each step says; long steps show a bar."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fliqs_hf_cli import main
from tests.cli.test_commands import answer, failure, photos  # noqa: F401 - a fixture
from tests.helpers.hub_server import HubServer


def test_every_step_of_the_pilot_shows_its_progress_and_refreshes_the_report(
    fp32: Path,
    photos: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "pilot"
    quantized = answer_and_bars(
        capsys,
        "quantize",
        str(fp32),
        str(out),
        "--target_bits",
        "6",
        "--calibration",
        str(photos),
        "--batch_size",
        "8",
    )
    for bar in ("sensitivity: 100%", "calibration: 100%", "GPTQ: 100%"):
        assert bar in quantized
    assert main(["report", str(out)]) == 0
    assert "Not validated yet" in (out / "fliqs/report.html").read_text()
    validated = answer_and_bars(
        capsys, "validate", str(fp32), str(out), "--dataset_name", str(photos), "--max_drop", "90"
    )
    assert "validate: 100%" in validated
    page = (out / "fliqs/report.html").read_text()
    assert "Not validated yet" not in page
    assert "right on 24 images of photos" in page
    assert "written: " + str(out / "fliqs/report.html") in last_text(capsys, fp32, out, photos)


def test_validate_makes_no_report_where_there_was_none(
    fp32: Path,
    photos: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["quantize", str(fp32), str(tmp_path / "run")]) == 0
    last_text(capsys, fp32, tmp_path / "run", photos)
    assert not (tmp_path / "run" / "fliqs/report.html").exists()


def test_a_local_original_is_published_under_its_name_and_licence(
    hub: HubServer,
    fp32: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = str(tmp_path / "run")
    assert main(["quantize", str(fp32), out]) == 0
    assert "base_model='../x' is no name on the Hub" in failure(capsys, "push", out, "user/a", "--base_model", "../x")
    assert "license='Apache 2' is no identifier" in failure(capsys, "push", out, "user/a", "--license", "Apache 2")
    assert "user/a" not in hub.repos
    answer(capsys, "push", out, "user/a", "--base_model", "org/vit", "--license", "apache-2.0")
    card = hub.repos["user/a"].files()["README.md"].decode()
    for line in ("base_model: org/vit", "base_model_relation: quantized", "license: apache-2.0"):
        assert line in card
    assert "[org/vit](https://huggingface.co/org/vit) with" in card
    assert str(fp32) not in card


def answer_and_bars(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command writes to stderr; its stdout is one JSON object."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    written = capsys.readouterr()
    json.loads(written.out)
    return written.err


def last_text(capsys: pytest.CaptureFixture[str], original: Path, out: Path, images: Path) -> str:
    capsys.readouterr()
    assert main(["validate", str(original), str(out), "--dataset_name", str(images)]) == 0
    return capsys.readouterr().out
