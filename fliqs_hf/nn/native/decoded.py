"""The reference path with the weight decoded once and kept: the same bits, for the memory of a float32 weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fliqs_hf.nn.native.codes import quantized_values

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer


class DecodedProduct:
    """One layer with its weight decoded."""

    def __init__(self, layer: PackedLayer) -> None:
        self._weight = layer.decoded_weight()

    def __call__(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """What `layer` computes of `x`, in its dtype."""
        if self._weight.dtype != x.dtype:
            self._weight = layer.decoded_weight().to(x.dtype)
        return layer.multiply(quantized_values(layer, x), self._weight)
