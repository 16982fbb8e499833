"""`nn.Conv1d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.nn.kinds.convolution import Convolution
from fliqs_hf.nn.kinds.kind import register_kind
from fliqs_hf.quant.tokens import Tokens


class Conv1d(Convolution):
    """Input [images, channels, length]; blocks run along the channels of each position."""

    name = "conv1d"
    plain = nn.Conv1d
    tokens = Tokens((-2, -1), -2)
    onnx = "Conv"

    def _unfold(self, x: Tensor, kernel: Any, dilation: Any, stride: Any) -> Tensor:
        return functional.unfold(x.unsqueeze(2), (1, *kernel), dilation=(1, *dilation), stride=(1, *stride))


CONV1D = register_kind(Conv1d())
SearchableConv1d, PackedConv1d = CONV1D.searchable, CONV1D.packed
