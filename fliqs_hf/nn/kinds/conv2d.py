"""`nn.Conv2d`."""

from __future__ import annotations

from torch import nn

from fliqs_hf.nn.kinds.convolution import Convolution
from fliqs_hf.nn.kinds.kind import register_kind
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import SearchableLayer
from fliqs_hf.quant.tokens import IMAGE


class Conv2d(Convolution):
    """Input [images, channels, height, width]."""

    name = "conv2d"
    plain = nn.Conv2d
    tokens = IMAGE
    onnx = "Conv"
    lora = "Conv2d"


CONV2D = Conv2d()


class SearchableConv2d(SearchableLayer, nn.Conv2d):
    """`nn.Conv2d` (any stride, groups, padding) fake-quantized in formats that a switch chooses."""

    kind = CONV2D


class PackedConv2d(PackedLayer):
    """`nn.Conv2d` with a bit-packed weight; geometry as the layer it replaces."""

    kind = CONV2D


Conv2d.searchable, Conv2d.packed = SearchableConv2d, PackedConv2d
register_kind(CONV2D)
