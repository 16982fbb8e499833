"""A whole model with layers of the kinds that image classifiers rarely have, in every form of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.hf.export.forms import OnnxSettings
from fliqs_hf.hf.export.openvino_file import OpenVinoSettings
from fliqs_hf.hf.export.runtime import OpenVinoClassifier
from fliqs_hf.hf.export.targets import find_target
from fliqs_hf.nn.kernels import set_kernels
from tests.helpers.models import images, tiny


class Head(nn.Module):
    """[images, 32] to [images, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Conv1d(1, 4, 3, padding=1)
        self.larger = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.transposed = Conv1D(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence(x[:, None]).unflatten(-1, (4, 8))
        return self.transposed(self.larger(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("to", ["onnx", "openvino", "torch"])
@pytest.mark.parametrize(("weight", "activation"), [("int8", "int8"), ("mxfp4", "e4m3")])
def test_answers_are_the_packed_models(to: str, weight: str, activation: str, tmp_path: Path) -> None:
    """As in `test_architectures.py`: up to the order of sums, as no code rounds the other way for these inputs."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(to, to))
    plain = tiny("vit")
    plain.classifier = Head().eval()
    model = fliqs_hf.quantize(plain, FLIQSConfig(weight_format=weight, activation_format=activation))
    set_kernels(model, "reference")
    target = find_target(to)
    settings: Any = {"onnx": OnnxSettings(), "openvino": OpenVinoSettings("as_packed")}.get(to)
    forms = target.write(model, images(1), tmp_path / target.file, settings, None)
    assert {"classifier.sequence", "classifier.larger", "classifier.transposed"} <= {form.name for form in forms}
    file = (
        OpenVinoClassifier(tmp_path / target.file, threads=1, precision="f32")
        if to == "openvino"
        else target.load(tmp_path / target.file, model.config)
    )
    for count in (1, 5):
        with torch.no_grad():
            expected = model(images(count)).logits
            found = file(images(count))
        torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-4, atol=1e-5)
