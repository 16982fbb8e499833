"""A packed model as an ONNX graph in which every packed layer is one node, with its name but still no arithmetic."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.optional import needed_for

DOMAIN, NODE, LAYER = "fliqs_hf", "PackedLayer", "layer"
#: Images that are traced with: one would be taken for a constant.
_BATCH = 2


def trace(model: Any, image: Tensor, opset: int) -> Any:
    """The graph of `model`, an `onnx_ir.Model`: pixel_values [batch, channels, height, width], float32, to logits.

    Args:
        model: packed, of Transformers, in evaluation mode, on the CPU.
        image: pixel values [1, channels, height, width]: of this size the graph will take them.
    Raises: DependencyError: the extra "onnx" is missing. ConfigError: the model cannot be traced.
    """
    with needed_for("exporting to ONNX"):
        import onnx_ir  # noqa: F401 - all are imported by name further down
        import onnxscript  # noqa: F401
        from transformers.exporters import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    image = image.expand(_BATCH, -1, -1, -1).contiguous()
    config = OnnxConfig(
        dynamic=True,
        opset_version=opset,
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=2**16)}},
    )
    with _stand_ins(model), _quiet():
        try:
            graph = OnnxExporter().export(model, {"pixel_values": image}, config).program
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise ConfigError(
                f"Transformers cannot export {type(model).__name__} to ONNX: {' '.join(str(error).split())[:400]}"
            ) from error
    _name_batch(graph)
    return graph


@contextlib.contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Let every packed layer, for a while, be one operation of our domain that has its name."""
    layers = packed_layers(model)
    for name, layer in layers.items():
        layer.__dict__["forward"] = functools.partial(_stand_in, layer, name)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["forward"]


def _stand_in(layer: PackedLayer, name: str, x: Tensor) -> Tensor:
    if not layer.kind.matrix:
        weight = torch.empty(layer.weight_shape, device="meta")
        with torch.no_grad():
            shape = layer.kind.multiply(layer, x.to("meta"), weight, None).shape
    else:
        shape = torch.Size((*x.shape[:-1], layer.weight_shape[0]))
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NODE}", (x,), {LAYER: name}, dtype=x.dtype, shape=shape, version=1
    )
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes about versions that they were tested with and operators that we do not use."""
    names = ("torch.onnx", "transformers.exporters", "transformers.utils", "onnxscript")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _name_batch(graph: Any) -> None:
    """Call the symbolic dimension "batch", which says more than "s99"."""
    import onnx_ir

    first = graph.graph.inputs[0].shape[0]
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(["batch" if dim == first else dim for dim in value.shape])
