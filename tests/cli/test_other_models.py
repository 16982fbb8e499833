"""Models that are no image classifiers: what can be done with them is done, the rest is refused in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from fliqs_hf.cost import trace_layers
from fliqs_hf.hf.card import model_card
from fliqs_hf.pipeline.checkpoints import load_model
from fliqs_hf_cli import main
from tests.helpers.models import _VISION, _VIT

TEXT = {**_VIT, "vocab_size": 99, "eos_token_id": 98, "bos_token_id": 97, "pad_token_id": 1}
VIDEO = {**_VISION, "num_frames": 4}


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    hf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    return saved(tmp_path / "clip", hf.CLIPModel(hf.CLIPConfig(vision_config=_VISION, text_config=TEXT)))


def test_estimate_and_quantize_of_image_and_text_towers(
    clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(clip)
    text = torch.zeros(1, 77, dtype=torch.int64)
    expected = trace_layers(model, {"pixel_values": torch.zeros(1, 3, 32, 32), "input_ids": text})
    assert main(["estimate", clip, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == sum(layer.macs for layer in expected)
    assert main(["estimate", clip, "--image_size", "64"]) == 0
    assert "per image of 64 pixels and text of 77 tokens" in capsys.readouterr().out

    out = tmp_path / "out"
    assert main(["quantize", clip, str(out)]) == 0
    assert "text_model.encoder.layers.0.mlp.fc1" in capsys.readouterr().out
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantized"]["layers"] == 27
    target = ["quantize", clip, str(tmp_path / "target"), "--target_bits", "4", "--calibration", "digits"]
    assert main(target) == 2
    assert "CLIPModel is not" in capsys.readouterr().err


def test_uniform_formats_need_no_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that cannot be run on an image is packed all the same, and later commands do without its costs."""
    source = saved(tmp_path / "video", hf.VideoMAEForVideoClassification(hf.VideoMAEConfig(**VIDEO)))
    assert main(["estimate", source, "--json"]) == 2
    assert "cannot trace VideoMAEForVideoClassification: its forward" in json.loads(capsys.readouterr().out)["error"]

    out = tmp_path / "out"
    assert main(["quantize", source, str(out), "--weight_format", "int4", "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)["cost"] == {}
    assert "costs are not known" in answer.err
    assert not (out / "fliqs/layers.json").exists()
    assert main(["quantize", source, str(tmp_path / "text")]) == 0
    assert "bit operations  unknown" in capsys.readouterr().out
    frames = torch.zeros(1, 4, 3, 32, 32)
    packed = load_model(str(out))
    assert packed(frames).logits.shape == load_model(source)(frames).logits.shape
    assert main(["inspect", str(out)]) == 0
    assert "int4" in str(model_card(out))
    capsys.readouterr()
    assert main(["report", str(out)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


def test_a_name_in_a_config_is_a_model_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("logging", "AutoConfig", 5, "V")):
        config = {"model_type": "vit", **_VISION, "architectures": [name]}
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config))
        assert main(["estimate", str(tmp_path / str(number))]) in (0, 2)
        assert "looks like a bug" not in capsys.readouterr().err
