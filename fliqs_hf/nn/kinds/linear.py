"""`nn.Linear`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.nn.kinds.kind import LayerKind, register_kind
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import SearchableLayer
from fliqs_hf.quant.tokens import ROW


class Linear(LayerKind):
    """Input [..., in], output [..., out]. `nn.MultiheadAttention` has a subclass of `nn.Linear` whose weight it uses
    without calling it, so no subclass is one."""

    name = "linear"
    plain = nn.Linear
    tokens = ROW
    arguments: ClassVar[tuple[str, ...]] = ("in_features", "out_features")
    matrix = True
    onnx = "MatMul"
    lora = "Linear"

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def input_rows(self, layer: Any, x: Tensor) -> Tensor:
        return x

    def not_a_product(self, layer: Any) -> str:
        return ""

    def product_rows(self, layer: Any, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def product_output(self, layer: Any, products: Tensor, shape: torch.Size) -> Tensor:
        return products.view(*shape[:-1], -1)

    def takes(self, layer: Any, x: Tensor) -> bool:
        return x.dim() > 0 and x.numel() > 0 and x.shape[-1] == self.weight_shape(layer)[1]


LINEAR = Linear()


class SearchableLinear(SearchableLayer, nn.Linear):
    """`nn.Linear` whose weight [out, in] and input [..., in] are fake-quantized in formats that a switch chooses."""

    kind = LINEAR


class PackedLinear(PackedLayer):
    """`nn.Linear` with a bit-packed weight. Input [..., in], output [..., out]."""

    kind = LINEAR

    @property
    def in_features(self) -> int:
        return self.weight_shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_shape[0]


Linear.searchable, Linear.packed = SearchableLinear, PackedLinear
register_kind(LINEAR)
