"""Packed models as programs of `torch.export` against the packed models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessor

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.errors import ConfigError
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
    plain = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(plain(images(2)), model(images(2)).logits)  # also where gradients are on
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_a_compiled_program_gives_the_packed_models_answers(tmp_path: Path) -> None:
    """In any batch size; fused loops may sum in another order, and no code rounds the other way for these inputs."""
    shutil.which("g++") or pytest.skip("no C++ compiler")
    folder = tmp_path / "packed"
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4", activation_format="int8"))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    result = fliqs_hf.export(folder, tmp_path / "out", to="aotinductor", images=[images(4)])
    assert (result.files[0], result.agreement.same) == ("model.pt2", 4)
    set_kernels(model, "reference")
    program = torch._inductor.aoti_load_package(str(tmp_path / "out" / "model.pt2"))
    for count in (1, 5):
        with torch.no_grad():
            torch.testing.assert_close(program(images(count)), model(images(count)).logits, rtol=1e-5, atol=1e-6)


def test_no_compiler_is_named_before_any_work(tmp_path: Path) -> None:
    # Not by monkeypatch, which would remove the setting when it is done: this one lives outside of the module's dict.
    without = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with without, pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is none: install g\+\+ .* CXX"):
        fliqs_hf.export(tmp_path / "nothing", tmp_path / "out", to="aotinductor")
