"""`Conv1D` of Transformers: a Linear whose parameter is [in, out]."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fliqs_hf.nn.kinds.kind import register_kind
from fliqs_hf.nn.kinds.linear import Linear


class TransposedLinear(Linear):
    """Input [..., nx], output [..., nf]; always with a bias."""

    name = "transposed_linear"
    plain = Conv1D
    arguments = ("nf", "nx")

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # In the layout of the plain layer's product: sums may depend on it.
        return super().multiply(layer, x, self.parameter(layer, weight).t(), bias)

    def rows(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.t()

    def parameter(self, layer: Any, rows: Tensor) -> Tensor:
        return rows.t().contiguous()

    def make_plain(self, layer: Any, bias: bool) -> nn.Module:
        return Conv1D(layer.nf, layer.nx).to("meta")


TRANSPOSED_LINEAR = register_kind(TransposedLinear())
SearchableTransposedLinear, PackedTransposedLinear = TRANSPOSED_LINEAR.searchable, TRANSPOSED_LINEAR.packed
