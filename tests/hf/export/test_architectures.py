"""Whole models in ONNX Runtime against the packed models, one of each kind that is promised."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.hf.export.forms import OnnxSettings
from fliqs_hf.hf.export.onnx_file import write_onnx
from fliqs_hf.hf.export.runtime import OnnxClassifier
from fliqs_hf.nn.kernels import set_kernels
from tests.helpers.models import images, tiny

onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


def exported(
    architecture: str, folder: Path, weight: str = "int8", activation: str = "int8", **settings: Any
) -> tuple[Any, Any]:
    model = fliqs_hf.quantize(tiny(architecture), FLIQSConfig(weight_format=weight, activation_format=activation))
    set_kernels(model, "reference")
    write_onnx(model, images(1), folder / "model.onnx", OnnxSettings(**settings))
    return model, OnnxClassifier(folder / "model.onnx", threads=1)


@pytest.mark.parametrize("architecture", ["vit", "deit", "dinov2", "swin", "resnet", "mobilenet_v2"])
def test_answers_are_the_packed_models(architecture: str, tmp_path: Path) -> None:
    """In any batch size. Logits are about 0.2 to 2: a code that rounds the other way would move them by 1e-4 or more,
    and none does for these inputs; else they differ by the order of sums."""
    model, file = exported(architecture, tmp_path)
    for count in (1, 5):
        pixels = images(count)
        with torch.no_grad():
            expected = model(pixels).logits
        torch.testing.assert_close(file(pixels).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("architecture", "weight", "activation"), [
    ("vit", "mxfp4", "nvfp4"), ("swin", "int4_g32", "int4_zp"), ("resnet", "nvfp4", "mxfp8_e4m3"),
])  # fmt: skip
def test_formats_with_scales_of_their_own(architecture: str, weight: str, activation: str, tmp_path: Path) -> None:
    """As above; batch norms are folded into the scales' products, which rounds once more."""
    model, file = exported(architecture, tmp_path, weight, activation)
    with torch.no_grad():
        expected = model(images(2)).logits
    torch.testing.assert_close(file(images(2)).logits, expected, rtol=1e-4, atol=1e-4)


def test_q_k_and_v_read_one_quantized_input(tmp_path: Path) -> None:
    exported("vit", tmp_path)
    graph = onnx_ir.load(tmp_path / "model.onnx").graph
    products = [node for node in graph if node.op_type == "MatMulIntegerToFloat"]
    codes = {node.inputs[0].name for node in products}
    assert len(products) == 2 * 6 + 2  # with the patches and the head
    assert len(codes) == 2 * 4 + 2  # q, k and v of each of the two blocks are three readers of one


def test_batch_norms_are_folded_into_integer_products(tmp_path: Path) -> None:
    exported("resnet", tmp_path)
    model = onnx_ir.load(tmp_path / "model.onnx")
    kinds = [node.op_type for node in model.graph]
    assert "ConvInteger" in kinds and "BatchNormalization" not in kinds
    assert not [name for name in model.graph.initializers if "running_mean" in name]


@pytest.mark.parametrize("weight", ["int8", "int4", "e2m1"])
def test_one_scale_for_the_batch_is_fused_by_onnx_runtime(weight: str, tmp_path: Path) -> None:
    """Into one operator with the quantization of an input that one layer reads; weights of 4 bits are widened once."""
    import onnxruntime

    exported("vit", tmp_path, weight, input_scales="per_tensor")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx_ir.load(tmp_path / "optimized.onnx").graph)
    assert kinds["MatMulInteger"] == 0
    assert kinds["DynamicQuantizeMatMul"] == 2 * 3 + 1  # o_proj, fc1 and fc2, and the head
    assert kinds["MatMulIntegerToFloat"] == 2 * 3 + 1  # q, k and v read one input; patches are cut from one
    assert kinds["DynamicQuantizeLinear"] == 2 + 1
