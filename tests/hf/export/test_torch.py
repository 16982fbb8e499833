"""Packed models as programs of `torch.export` against the packed models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.hf.export.torch_file import TorchProgram, write_torch
from fliqs_hf.nn.kernels import set_kernels
from tests.helpers.models import images, tiny


@pytest.mark.parametrize("architecture", [
    "vit", "deit", "dinov2", "swin", "resnet", pytest.param("mobilenet_v2", marks=pytest.mark.slow),
])  # fmt: skip
def test_answers_are_the_packed_models(architecture: str, tmp_path: Path) -> None:
    """Bit for bit, in any batch size: it is the reference path, operation by operation."""
    model = fliqs_hf.quantize(tiny(architecture), FLIQSConfig(weight_format="int4", activation_format="e4m3"))
    set_kernels(model, "reference")
    write_torch(model, images(1), tmp_path / "model.pt2")
    program = TorchProgram(tmp_path / "model.pt2")
    for count in (1, 5):
        with torch.no_grad():
            assert torch.equal(program(images(count)).logits, model(images(count)).logits)
