"""`fliqs-hf quantize` and what follows it on a model with batch norms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForImageClassification, ResNetForImageClassification, ViTImageProcessorPil

from fliqs_hf_cli import main
from tests.helpers.models import tiny


@pytest.fixture
def source(tmp_path: Path) -> str:
    folder = tmp_path / "fp32"
    config = tiny("resnet").config
    config.id2label = {digit: str(digit) for digit in range(10)}
    config.label2id = {str(digit): digit for digit in range(10)}
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "norms"),
    [([], 0), (["--fold_batchnorm", "false"], 6), (["--calibration", "digits", "--calibration_images", "16"], 0)],
    ids=str,
)
def test_norms_are_folded_unless_that_is_switched_off(
    arguments: list[str], norms: int, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", source, out, "--weight_format", "int8", "--json", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    model = AutoModelForImageClassification.from_pretrained(out)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == norms
    assert main(["inspect", out, "--json"]) == 0
    inspected = json.loads(capsys.readouterr().out)
    assert inspected["quantized"]["layers"] == len(answer["allocation"])
    validate = ["validate", source, out, "--dataset_name", "digits", "--max_samples", "16", "--max_drop", "100"]
    assert main(validate) == 0, capsys.readouterr().err
    assert main(["report", out]) == 0
