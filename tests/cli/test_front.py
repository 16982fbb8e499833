"""`fliqs-hf front`: files, and that each point is what its row says."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

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
    assert re.findall(r'href="([\w-]+)\.json"', page) == [row["point"] for row in table]
    assert "<script" not in page and (out / "front.png").stat().st_size > 1000
    assert fliqs_hf_cli.main(command) == 2 and "new or empty" in capsys.readouterr().err
    unknown = [*command[:2], str(tmp_path / "other"), *command[3:], "--costs", "watts"]
    assert fliqs_hf_cli.main(unknown) == 2 and "unknown kind of cost 'watts'" in capsys.readouterr().err
