"""`fliqs-hf front`: files, and that each point is what its row says."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import fliqs_hf_cli
from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import bops, trace_layers
from tests.helpers.models import tiny


def test_files_of_a_front(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    out = tmp_path / "front"
    command = ["front", str(tmp_path / "fp32"), str(out), "--calibration", "digits", "--calibration_images", "16",
               "--match_labels", "index", "--label_column", "none", "--search_space", "int2", "int4", "int8",
               "--points", "4", "--json"]  # fmt: skip
    assert fliqs_hf_cli.main(command) == 0
    text = capsys.readouterr().out
    rows = json.loads(text[text.index("[\n") :])
    with (out / "front.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["point"] for row in table] == [row["name"] for row in rows] and len(rows) > 4
    layers = trace_layers(tiny("vit"))
    for row in table:
        allocation = Allocation.load(out / f"{row['point']}.json")
        assert float(row["bops"]) == bops(layers, allocation) and row["formats"] == allocation.summary()
    for by in ("bops", "weight_bytes"):
        front = [(float(row[by]), float(row["expected_loss_increase"])) for row in table if row["by"] == by]
        assert front == sorted(front) and [loss for _, loss in front] == sorted((y for _, y in front), reverse=True)
    page = (out / "front.html").read_text(encoding="utf-8")
    assert re.findall(r'download="([\w-]+)\.json"', page) == [row["point"] for row in table]
    for data, name in re.findall(r'href="data:application/json;base64,([^"]+)" download="([^"]+)"', page):
        assert base64.b64decode(data) == (out / name).read_bytes()
    assert "No accuracy was measured" in page and "accuracy" not in table[0]
    assert "<script" not in page and (out / "front.png").stat().st_size > 1000
    assert fliqs_hf_cli.main(command) == 2 and "new or empty" in capsys.readouterr().err
    unknown = [*command[:2], str(tmp_path / "other"), *command[3:], "--costs", "watts"]
    assert fliqs_hf_cli.main(unknown) == 2 and "unknown kind of cost 'watts'" in capsys.readouterr().err


def test_a_front_that_breaks_off_leaves_nothing_and_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    out = tmp_path / "made" / "front"
    command = ["front", str(tmp_path / "fp32"), str(out), "--calibration", "digits", "--calibration_images", "8",
               "--label_column", "none", "--search_space", "int4", "int8", "--points", "3"]  # fmt: skip

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fliqs_hf.cli.front.write_png", interrupted)
        assert fliqs_hf_cli.main(command) == 130
    assert not out.exists() and list(out.parent.iterdir()) == []
    # One that is killed at the same place cannot clear up: what it left is in nobody's way.
    (out.parent / ".tmp.front").mkdir()
    (out.parent / ".tmp.front" / "bops-01.json").write_text("{}")
    assert fliqs_hf_cli.main(command) == 0
    assert (out / "front.html").exists() and [path.name for path in out.parent.iterdir()] == ["front"]


def test_chosen_points_are_packed_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    out = tmp_path / "front"
    given = ["--calibration", "digits", "--calibration_images", "16", "--match_labels", "index", "--batch_size", "64"]
    space = ["--search_space", "int2", "int4", "int8", "--costs", "bops", "--points", "5"]
    held = ["--measure", "3", "--held_out_images", "50"]
    assert fliqs_hf_cli.main(["front", str(tmp_path / "fp32"), str(out), *given, *space, *held]) == 0
    assert "top-1: of packed models on 50 images" in capsys.readouterr().out
    with (out / "front.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    measured = [number for number, row in enumerate(table) if row["accuracy"]]
    assert len(measured) == 3 and {0, len(table) - 1} < set(measured)
    for number in measured:
        value, low, high = (float(table[number][name]) for name in ("accuracy", "low", "high"))
        assert 0 <= low <= value <= high <= 1 and (50 * value).is_integer() and table[number]["images"] == "50.0"
    # The figure is that of the model which the command writes from the same allocation.
    name = table[measured[0]]["point"]
    run = [
        "quantize",
        str(tmp_path / "fp32"),
        str(tmp_path / "run"),
        *given,
        "--allocation",
        str(out / f"{name}.json"),
    ]
    floor = ["--min_accuracy", "0", "--held_out_images", "50", "--json"]
    assert fliqs_hf_cli.main([*run, *floor]) == 0
    trial = json.loads(capsys.readouterr().out)["floor"]["trials"][0]
    assert trial["accuracy"] == float(table[measured[0]]["accuracy"])
    page = (out / "front.html").read_text(encoding="utf-8")
    assert page.count('class="accuracy"') == 3 and "top-1, measured" in page
