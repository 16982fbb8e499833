"""`nn.Conv2d`."""

from __future__ import annotations

from torch import nn

from fliqs_hf.nn.kinds.convolution import Convolution
from fliqs_hf.nn.kinds.kind import register_kind
from fliqs_hf.quant.tokens import IMAGE


class Conv2d(Convolution):
    """Input [images, channels, height, width]."""

    name = "conv2d"
    plain = nn.Conv2d
    tokens = IMAGE
    onnx = "Conv"
    lora = "Conv2d"


CONV2D = register_kind(Conv2d())
SearchableConv2d, PackedConv2d = CONV2D.searchable, CONV2D.packed
