"""What tests of users' mistakes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, ViTImageProcessor

from fliqs_hf.pipeline import job as recipe_job
from fliqs_hf.pipeline import search as recipe
from tests.helpers.models import tiny

#: Names of models, and what the message says of them. {} is the folder of `write_models`.
SOURCES = [
    ("", "model='' is empty"),
    ("  ", "is empty"),
    ("{}/nowhere", "there is no folder"),
    ("./nowhere", "there is no folder './nowhere'"),
    ("a/b/c", "'a/b/c'"),
    ("not a name", "'not a name'"),
    ("{}/vit/config.json", "is a file: give the folder"),
    ("{}/vit/model.safetensors", "is a file: give the folder"),
    ("{}/empty", "holds no model"),
    ("{}/run", "did you mean"),
    ("{}/diffusers", "pipeline of several models"),
    ("{}/adapter", "adapter only"),
    ("{}/broken", "cannot load the configuration"),
    ("{}/listed", "cannot load the configuration"),
    ("{}/unknown", "nonesuch"),
    ("{}/foreign", "quantized by 'awq'"),
    ("{}/remote", "code of its own"),
]


def write_models(root: Path) -> None:
    """What can be mistaken for a model: {vit} and {text} are models, the others are not."""
    tiny("vit", 0).save_pretrained(root / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    tiny("vit", 0).save_pretrained(root / "no_processor")
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    BertModel(config).save_pretrained(root / "text")
    for name, files in {
        "empty": {},
        "diffusers": {"model_index.json": "{}"},
        "adapter": {"adapter_config.json": "{}"},
        "broken": {"config.json": "{"},
        "listed": {"config.json": "[]"},
        "unknown": {"config.json": '{"model_type": "nonesuch"}'},
        "foreign": {"config.json": '{"model_type": "vit", "quantization_config": {"quant_method": "awq"}}'},
        "weightless": {"config.json": '{"model_type": "vit", "architectures": ["ViTForImageClassification"]}'},
        "remote": {"config.json": '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}'},
        "zero": {"config.json": '{"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": 0}'},
    }.items():
        (root / name).mkdir()
        for file, text in files.items():
            (root / name / file).write_text(text)
    (root / "run" / "fp32").mkdir(parents=True)
    (root / "run" / "fp32" / "config.json").write_text("{}")


def refused(status: int, out: str, err: str, named: str) -> None:
    assert status == 2, err
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if not line.startswith(("[transformers]", "costs are"))]
    assert named in line
    assert "looks like a bug" not in line and "raised by" not in line
    assert out == ""


def filled(arguments: list[str], there: Path) -> list[str]:
    return [argument.replace("{}", str(there)) for argument in arguments]


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever loads data or a classifier fails the test."""

    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("data are loaded")

    for module, name in ((recipe_job, "load_splits"), (recipe, "finetune"), (recipe_job, "load_classifier")):
        monkeypatch.setattr(module, name, loads)
    monkeypatch.setattr("fliqs_hf.cli.validate.to_validate", loads)
    monkeypatch.setattr("fliqs_hf.cli.calibration.load_split", loads)
    monkeypatch.setattr("fliqs_hf.pipeline.compare.load_splits", loads)
