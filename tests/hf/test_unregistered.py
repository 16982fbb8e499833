"""A process that does not import the package never runs a packed checkpoint, whatever flags it passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification, CLIPVisionModel, pipeline

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.hf.unregistered import HINT
from tests.helpers.models import images, tiny

_FLAGS: list[dict[str, Any]] = [
    {},
    {"device_map": "cpu"},
    {"device_map": "auto"},
    {"low_cpu_mem_usage": True},
    {"use_safetensors": True},
    {"dtype": "bfloat16"},
    {"dtype": "auto"},
    {"output_loading_info": True},
    {"trust_remote_code": True},
    {"attn_implementation": "eager"},
    {"local_files_only": True, "weights_only": False},
]
_SCRIPT = """
import json, sys
import transformers
folders, flags = json.loads(sys.argv[1])
outcomes = []
for folder, names in folders.items():
    for name in names:
        for kwargs in flags:
            if name == "pipeline" and {"trust_remote_code", "local_files_only"} & set(kwargs):
                continue  # arguments of its own
            for mismatched in ({}, {"ignore_mismatched_sizes": True}):
                try:
                    if name == "pipeline":
                        transformers.pipeline("image-classification", folder, model_kwargs={**kwargs, **mismatched})
                    elif name == "config=":
                        config = transformers.AutoConfig.from_pretrained(folder)
                        cls = transformers.AutoModelForImageClassification
                        cls.from_pretrained(folder, config=config, **kwargs, **mismatched)
                    else:
                        getattr(transformers, name).from_pretrained(folder, **kwargs, **mismatched)
                    problem = None
                except Exception as error:
                    problem = str(error)
                outcomes.append([name, {**kwargs, **mismatched}, problem])
assert not any(name.startswith("fliqs_hf") for name in sys.modules)
print(json.dumps(outcomes))
"""


def test_no_set_of_flags_loads_random_weights(tmp_path: Path) -> None:
    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path / "vit")
    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    quantize(tiny("clip"), FLIQSConfig()).save_pretrained(tmp_path / "clip")
    folders = {
        str(tmp_path / "vit"): [
            "AutoModel", "AutoModelForImageClassification", "ViTForImageClassification", "ViTModel", "pipeline",
            "config=",
        ],
        str(tmp_path / "shards"): ["AutoModelForImageClassification"],
        # Classes of a part read only the part's config.
        str(tmp_path / "clip"): ["CLIPForImageClassification", "CLIPVisionModel"],
    }  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([folders, _FLAGS])],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout.splitlines()[-1])
    assert len(outcomes) == 9 * 2 * len(_FLAGS) - 4
    assert [outcome[:2] for outcome in outcomes if not outcome[2] or HINT not in outcome[2]] == []


@pytest.mark.parametrize("architecture", ["vit", "clip", "siglip"])
def test_here_every_way_of_loading_works(architecture: str, tmp_path: Path) -> None:
    packed = quantize(tiny(architecture), FLIQSConfig())
    packed.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["fusion_config"] == {HINT: True}
    with torch.no_grad():
        expected = packed(images()).logits
        config = AutoConfig.from_pretrained(tmp_path)
        for arguments in ({}, {"config": config}, {"device_map": "cpu"}, {"use_safetensors": True}):
            model = AutoModelForImageClassification.from_pretrained(tmp_path, **arguments)
            assert torch.equal(model(images()).logits, expected)
            assert not hasattr(model.config, "fusion_config")
        assert hasattr(config, "fusion_config")  # the caller's own is left alone


def test_pipeline_takes_a_packed_model(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessor

    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    answers = pipeline("image-classification", str(tmp_path))(Image.new("RGB", (32, 32)))
    assert len(answers) == 5


def test_a_part_of_a_packed_model_is_not_loaded_at_random(tmp_path: Path) -> None:
    quantize(tiny("clip"), FLIQSConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a class of the whole model"):
        CLIPVisionModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_model_that_is_plain_again_asks_for_nothing(tmp_path: Path) -> None:
    packed = quantize(tiny("clip"), FLIQSConfig())
    packed.save_pretrained(tmp_path / "packed")
    packed.dequantize().save_pretrained(tmp_path / "plain")
    assert "fusion_config" not in (tmp_path / "plain" / "config.json").read_text()


def test_fusions_of_the_user_stay(tmp_path: Path) -> None:
    model = tiny("vit")
    model.config.fusion_config = {"patch_embeddings": True}
    quantize(model, FLIQSConfig()).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.fusion_config == {"patch_embeddings": True}
