"""The recipe on every architecture that it serves: from scratch and from a checkpoint, a few steps each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from fliqs_hf import Allocation
from fliqs_hf.nn import packed_layers, quantizable_layers
from fliqs_hf.pipeline.search import main
from tests.helpers.models import tiny

SETTINGS: dict[str, Any] = {
    "dataset_name": "digits",
    "cache_images": True,
    "use_cpu": True,
    "finetune_steps": 3,
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "max_train_samples": 32,
    "max_eval_samples": 16,
    "batchnorm_images": 16,
    "search_space": ["int4", "e2m1", "int5", "int6", "int8"],
    "cap": True,
    "search_overrides": {"prior_images": 16, "explore_fraction": 0.5},
    "target_bits": [5.0],
}
_VIT = {
    "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
#: model_type -> (side in pixels, config_overrides)
SCRATCH: dict[str, tuple[int, dict[str, Any]]] = {
    "vit": (16, _VIT),
    "deit": (16, _VIT),
    "beit": (16, _VIT),
    "dinov2": (16, {key: value for key, value in _VIT.items() if key != "intermediate_size"}),
    "swin": (16, {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}),
    "resnet": (16, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}),
    "mobilenet_v2": (16, {"depth_multiplier": 0.35, "finegrained_output": False}),
    "efficientnet": (32, {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320}),
    "convnext": (16, {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
}


def run(folder: Path, **changes: Any) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(folder / "run")} | changes))
    main([str(file)])
    return folder / "run"


def check(run: Path) -> nn.Module:
    """The delivered model: every layer that can be quantized is, all norms after convolutions are folded."""
    results = json.loads((run / "fliqs" / "results.json").read_text())
    assert results["accuracy"]["searched"]["n"] == 16
    model = AutoModelForImageClassification.from_pretrained(run)
    allocation = Allocation.load(run / "fliqs" / "allocation.json")
    assert model.config.quantization_config.allocation == allocation
    plain = AutoModelForImageClassification.from_config(model.config)
    assert set(allocation) == set(quantizable_layers(plain)) == set(packed_layers(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model


@pytest.mark.parametrize("model_type", SCRATCH)
def test_from_scratch(model_type: str, tmp_path: Path) -> None:
    size, overrides = SCRATCH[model_type]
    folder = run(tmp_path, model_type=model_type, image_size=size, config_overrides=overrides)
    model = check(folder)
    assert model.config.model_type == model_type
    norms = [
        m for m in AutoModelForImageClassification.from_config(model.config).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert len(model.config.quantization_config.folded or {}) == len(norms)
    plain = AutoModelForImageClassification.from_pretrained(folder / "fliqs" / "fp32")
    for module in plain.modules():  # measured on 16 images, 8 at a time, after the last step
        if isinstance(module, nn.BatchNorm2d):
            assert int(module.num_batches_tracked) == 2 and bool(module.running_var.isfinite().all())


@pytest.mark.parametrize("architecture", ["deit-distilled", "resnet", "mobilenet_v2", "efficientnet", "convnext"])
def test_from_a_checkpoint(architecture: str, tmp_path: Path) -> None:
    tiny(architecture).save_pretrained(tmp_path / "fp32")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    check(run(tmp_path, model_name_or_path=str(tmp_path / "fp32")))


def test_norms_stay_where_that_is_asked_for(tmp_path: Path) -> None:
    size, overrides = SCRATCH["resnet"]
    folder = run(
        tmp_path, model_type="resnet", image_size=size, config_overrides=overrides, fold_batchnorm=False,
        batchnorm_images=0,
    )  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(folder)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 6 and model.config.quantization_config.folded is None
    # running averages of 3 steps of fine-tuning and 4 (of 2 passes at most) of the search, not of one estimate
    assert all(int(norm.num_batches_tracked) > 3 for norm in norms)
