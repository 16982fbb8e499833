"""Exact products of 8-bit integers, by oneDNN."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fliqs_hf.nn.native.codes import ZERO_POINT, int8_shift, quantized_codes
from fliqs_hf.nn.native.compiled import library

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer


@cache
def largest_exact_weight() -> int:
    """The largest weight code whose int8 products this CPU sums exactly: 127, 64 without VNNI, 0 without a kernel.

    Found by products that would saturate 16-bit sums, of the shapes that select different kernels, not by the name of
    the CPU: 255 · 127 · 2 is beyond 16 bits, 255 · 64 · 2 is not.
    """
    for largest in (127, 64):
        if all(_sums_exactly(rows, features, outputs, largest) for rows, features, outputs in _PROBES):
            return largest
    return 0


_PROBES = ((1, 64, 16), (3, 100, 10), (64, 192, 576), (200, 768, 192))


def _sums_exactly(rows: int, features: int, outputs: int, largest: int) -> bool:
    try:
        weight = torch.full((outputs, features), largest, dtype=torch.int8)
        weight[::2] = -largest
        codes = torch.full((rows, features), 255, dtype=torch.uint8)
        product = _product(codes, _prepacked(weight), torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32))
    except (RuntimeError, NotImplementedError, AttributeError):  # a build of torch without oneDNN
        return False
    return torch.equal(product, (weight.double().sum(1) * (255 - ZERO_POINT)).float().expand(rows, -1))


def _prepacked(weight: Tensor) -> Any:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def _product(codes: Tensor, weight: Any, scale: Tensor, zeros: Tensor) -> Tensor:
    """Σ (code − 128) · weight · scale, float32 [rows, outputs]."""
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, ZERO_POINT, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


class Int8Product:
    """One layer with its weight prepared."""

    def __init__(self, layer: PackedLayer) -> None:
        shift_w, shift_x = int8_shift(layer.formats.weight), int8_shift(layer.formats.activation)
        assert shift_w is not None and shift_x is not None and layer.weight_scale is not None
        outputs = layer.weight_shape[0]
        codes = layer.code_values().mul_(2.0**shift_w).to(torch.int8)
        self._weight = _prepacked(codes.view(outputs, -1))
        self._scale = (layer.weight_scale * 2.0 ** -(shift_w + shift_x)).expand(outputs).contiguous()
        self._zeros = torch.zeros(outputs, dtype=torch.int32)

    def __call__(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """What `layer` computes of `x`, in its dtype."""
        kind, (codes, scale) = layer.kind, quantized_codes(layer, x)
        out = self._rows(kind.product_rows(layer, codes), scale.reshape(-1), layer.bias)
        return kind.product_output(layer, out.to(x.dtype), x.shape)

    def _rows(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """float32 [rows, outputs] from codes [rows, features] and scales [n], each of rows / n rows in turn."""
        out = _product(codes, self._weight, self._scale, self._zeros)
        bias = None if bias is None else bias.float().contiguous()
        if (compiled := library()) is not None:
            return compiled.finish_(out, scale, bias)
        out.view(scale.numel(), -1).mul_(scale[:, None])
        return out if bias is None else out.add_(bias)
