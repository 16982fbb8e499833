"""The arithmetic of packed layers in ONNX, in place of the nodes that stand for them.

An input is quantized once for all layers that read it in one format. Codes of inputs are uint8 with zero point 128:
that is the fast case of int8 products on x86. The sums are exact, as in `nn/native.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from fliqs_hf.formats import BlockFormat
from fliqs_hf.hf.export.blocks import decoded_blocks
from fliqs_hf.hf.export.forms import LayerForm, OnnxSettings, asymmetric
from fliqs_hf.hf.export.geometry import Geometry
from fliqs_hf.hf.export.inputs import Codes, InputWriter
from fliqs_hf.hf.export.nodes import MICROSOFT, Writer
from fliqs_hf.hf.export.traced import DOMAIN, LAYER, NODE
from fliqs_hf.hf.export.weights import channels, stored_codes
from fliqs_hf.nn.native.codes import ZERO_POINT, int8_shift
from fliqs_hf.nn.packed import PackedLayer


@dataclass(frozen=True)
class Affine:
    """What is applied to the products of one layer, per output channel: float32 [out]."""

    gain: NDArray[np.float32]
    bias: NDArray[np.float32] | None


def rewrite(
    model: Any, layers: Mapping[str, PackedLayer], forms: Mapping[str, LayerForm], settings: OnnxSettings
) -> None:
    """Give every layer's node its arithmetic, in place."""
    writer = Writer(model)
    inputs = InputWriter(writer)
    weights: dict[str, Any] = {}
    for node in list(model.graph):
        if node.op_type != NODE:
            continue
        name = node.attributes[LAYER].as_string()
        layer = layers[name]
        writer.before, writer.layer = node, name
        last, affine = node, _affine(layer)
        if (norm := _batch_norm(node)) is not None:
            last, affine = norm, _folded(affine, norm)
        product = _Product(writer, inputs, name, layer, forms[name], settings, affine, weights)
        writer.replace(last.outputs, product(node.inputs[0]))
        for old in dict.fromkeys((last, node)):  # the reader first
            model.graph.remove(old, safe=True)
    del model.opset_imports[DOMAIN]


def _affine(layer: PackedLayer) -> Affine:
    bias = None if layer.bias is None else layer.bias.detach().float().cpu().numpy()
    return Affine(np.ones(layer.weight_shape[0], dtype=np.float32), bias)


def _batch_norm(node: Any) -> Any:
    """The batch normalization that alone reads the output of `node`, with constant statistics."""
    users = list(node.outputs[0].uses())
    if len(users) != 1 or users[0][0].op_type != "BatchNormalization" or users[0][1] != 0:
        return None
    norm = users[0][0]
    constant = all(value is not None and value.const_value is not None for value in norm.inputs[1:])
    return norm if constant and not any(out.uses() for out in norm.outputs[1:]) else None


def _folded(affine: Affine, norm: Any) -> Affine:
    """`affine` and then the normalization."""
    gamma, beta, mean, variance = (value.const_value.numpy().astype(np.float64) for value in norm.inputs[1:5])
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gain = gamma / np.sqrt(variance + epsilon)
    bias = 0 if affine.bias is None else affine.bias
    return Affine((affine.gain * gain).astype(np.float32), (beta + (bias - mean) * gain).astype(np.float32))


class _Product:
    """The nodes of one layer."""

    def __init__(
        self, writer: Writer, inputs: InputWriter, name: str, layer: PackedLayer, decided: LayerForm,
        settings: OnnxSettings, affine: Affine, weights: dict[str, Any],
    ) -> None:  # fmt: skip
        self.writer, self.inputs, self.name, self.layer = writer, inputs, name, layer
        self.decided, self.form, self.affine, self.weights = decided, settings.form, affine, weights
        self.asymmetric = decided.form == "integer" and asymmetric(layer, settings.input_scales)
        self.zero = [writer.constant(np.uint8(ZERO_POINT))] if decided.stored == "UINT8" else []
        self.convolution = not layer.kind.matrix

    def __call__(self, x: Any) -> Any:
        if self.decided.form == "integer":
            return self._integer(x)
        if self.decided.form == "qdq":
            values, scale = self.inputs.dequantized(x, self.layer)
        else:
            values, scale = self.inputs.rounded(x, self.layer), None
        if not self.convolution:
            product = self.writer.op("MatMul", values, self._weight())
        elif scale is None and self.affine.bias is not None:
            bias = self.writer.constant(self.affine.bias, f"{self.name}.bias")
            return self.writer.op(self.layer.kind.onnx, values, self._weight(), bias, **self._geometry())
        else:
            product = self.writer.op(self.layer.kind.onnx, values, self._weight(), **self._geometry())
        product = product if scale is None else self.writer.op("Mul", product, scale)
        return self._add(product, self._row(self.affine.bias))

    def _integer(self, x: Any) -> Any:
        codes = self.inputs.asymmetric(x) if self.asymmetric else self.inputs.codes(x, self.layer)
        shift = (int8_shift(self.layer.formats.weight) or 0) + codes.shift
        factors = (channels(self.layer) * np.float32(2.0**-shift) * self.affine.gain).astype(np.float32)
        if self.convolution:
            patches = self._patches(x)
            if self.form == "auto" and patches is not None:
                return self._product_of_patches(codes, factors, patches)
            return self._integer_convolution(codes, factors)
        if self.form == "auto" and not self.asymmetric:
            return self._runtime_product(codes, factors)
        product = self.writer.op("MatMulInteger", codes.values, self._codes(), codes.zero, *self.zero)
        return self._rescaled(product, codes, factors)

    def _runtime_product(self, codes: Codes, factors: NDArray[np.float32]) -> Any:
        """One operator for the product, its conversion and the factors per channel: a third of the passes' time."""
        scalar, bias = codes.scalar, self.affine.bias
        more = self.zero
        if scalar and bias is not None:
            more = [*(self.zero or [None]), self._row(bias)]
        product = self.writer.op(
            "MatMulIntegerToFloat", codes.values, self._codes(), codes.scale if scalar else 1.0,
            self._row(factors, "scale"), codes.zero, *more, domain=MICROSOFT,
        )  # fmt: skip
        if scalar:
            return product
        return self._add(self.writer.op("Mul", product, codes.scale), self._row(bias))

    def _patches(self, x: Any) -> list[int] | None:
        """How many patches in each dimension, where the convolution cuts its images into such without a rest."""
        if (
            self.layer.kind.not_a_product(self.layer)
            or x.shape is None
            or not all(isinstance(n, int) for n in x.shape[2:])
        ):
            return None
        pairs = list(zip(x.shape[2:], self.layer.geometry["kernel_size"], strict=True))
        return None if any(n % k for n, k in pairs) else [n // k for n, k in pairs]

    def _product_of_patches(self, codes: Codes, factors: NDArray[np.float32], patches: list[int]) -> Any:
        """As a Linear of patches: ONNX Runtime's ConvInteger takes ten times as long."""
        op, integers, dims = self.writer.op, self.writer.integers, range(len(patches))
        outputs, *row = self.layer.weight_shape
        sizes = [size for pair in zip(patches, row[1:], strict=True) for size in pair]
        blocks = op("Reshape", codes.values, integers(-1, row[0], *sizes))
        blocks = op("Transpose", blocks, perm=[0, *(2 + 2 * d for d in dims), 1, *(3 + 2 * d for d in dims)])
        values = op("Reshape", blocks, integers(-1, prod(patches), prod(row)))
        weight = op("Transpose", op("Reshape", self._codes(), integers(outputs, -1)), perm=[1, 0])
        bias = self.affine.bias
        product = op(
            "MatMulIntegerToFloat", values, weight, codes.scale if codes.scalar else 1.0,
            self.writer.constant(factors, f"{self.name}.scale"), codes.zero, *self.zero, domain=MICROSOFT,
        )  # fmt: skip
        if not codes.scalar:
            product = op("Mul", product, op("Reshape", codes.scale, integers(-1, 1, 1)))
        if bias is not None:
            product = op("Add", product, self.writer.constant(bias, f"{self.name}.bias"))
        return op("Reshape", op("Transpose", product, perm=[0, 2, 1]), integers(-1, outputs, *patches))

    def _integer_convolution(self, codes: Codes, factors: NDArray[np.float32]) -> Any:
        product = self.writer.op(
            "ConvInteger", codes.values, self._codes(), codes.zero, *self.zero, **self._geometry()
        )
        return self._rescaled(product, codes, factors)

    def _rescaled(self, product: Any, codes: Codes, factors: NDArray[np.float32]) -> Any:
        """int32 sums to real values. A scale of the whole batch goes to the channels first, which runtimes fuse."""
        sums = self.writer.op("Cast", product, to=onnx_ir.DataType.FLOAT)
        factor = self._row(factors, "scale")
        if codes.scalar:
            result = self.writer.op("Mul", sums, self.writer.op("Mul", codes.scale, factor))
        else:
            result = self.writer.op("Mul", self.writer.op("Mul", sums, factor), codes.scale)
        return self._add(result, self._row(self.affine.bias))

    def _add(self, x: Any, bias: Any) -> Any:
        return x if bias is None else self.writer.op("Add", x, bias)

    def _row(self, values: NDArray[np.float32] | None, what: str = "bias") -> Any:
        """Values per output channel, to be broadcast."""
        if values is None:
            return None
        key = f"{self.name}.{what}"
        shaped = values.reshape(-1, *[1] * (len(self.layer.weight_shape) - 2))
        if key not in self.weights:
            self.weights[key] = self.writer.constant(shaped, key)
        return self.weights[key]

    def _codes(self) -> Any:
        """int8 codes of the weight: [in, out] of a Linear, as it is of a convolution."""
        if self.name not in self.weights:
            self.weights[self.name] = stored_codes(self.writer, self.name, self.layer, self.decided.stored)
        return self.weights[self.name]

    def _weight(self) -> Any:
        """The weight in fp32: its codes times what a code is worth, which runtimes compute once, at loading."""
        key = f"{self.name}.decoded"
        if key not in self.weights:
            blocks = isinstance(self.layer.formats.weight, BlockFormat)
            weight = self._block_weight() if blocks else self._scaled_weight()
            self.weights[key] = self._transposed(weight) if self.layer.kind.onnx == "ConvTranspose" else weight
        return self.weights[key]

    def _scaled_weight(self) -> Any:
        codes, shift, writer = self._codes(), int8_shift(self.layer.formats.weight) or 0, self.writer
        factors = channels(self.layer) * np.float32(2.0**-shift) * self.affine.gain
        if self.decided.form == "qdq":
            scale = writer.constant(factors, f"{self.name}.scale")
            return writer.op("DequantizeLinear", codes, scale, axis=0 if self.convolution else 1)
        shape = (-1, *[1] * (len(self.layer.weight_shape) - 1)) if self.convolution else (-1,)
        scale = writer.constant(factors.reshape(shape), f"{self.name}.scale")
        return writer.op("Mul", writer.op("Cast", codes, to=onnx_ir.DataType.FLOAT), scale)

    def _block_weight(self) -> Any:
        op = self.writer.op
        weight = decoded_blocks(self.writer, self.name, self.layer, self._codes())
        if (self.affine.gain != 1).any():
            weight = op("Mul", weight, self.writer.constant(self.affine.gain.reshape(-1, 1), f"{self.name}.gain"))
        shape = self.writer.integers(*self.layer.weight_shape)
        return op("Reshape", weight, shape) if self.convolution else op("Transpose", weight)

    def _transposed(self, rows: Any) -> Any:
        """[out, in / groups, *kernel] as [in, out / groups, *kernel]."""
        op, integers = self.writer.op, self.writer.integers
        (outputs, inputs, *kernel), groups = self.layer.weight_shape, self.layer.geometry["groups"]
        rows = op("Reshape", rows, integers(groups, outputs // groups, inputs, *kernel))
        rows = op("Transpose", rows, perm=[0, 2, 1, *range(3, 3 + len(kernel))])
        return op("Reshape", rows, integers(groups * inputs, outputs // groups, *kernel))

    def _geometry(self) -> dict[str, Any]:
        g = Geometry.of(self.layer)
        more = {"output_padding": g.output_padding} if self.layer.kind.onnx == "ConvTranspose" else {}
        return {
            "kernel_shape": g.kernel, "strides": g.strides, "dilations": g.dilations, "group": g.groups,
            "pads": [*g.begins, *g.ends], **more,
        }  # fmt: skip
