"""The kinds of layers that can be quantized, one file each; `register_kind` adds one of your own."""

from fliqs_hf.nn.kinds.conv1d import CONV1D, PackedConv1d, SearchableConv1d
from fliqs_hf.nn.kinds.conv2d import CONV2D, PackedConv2d, SearchableConv2d
from fliqs_hf.nn.kinds.conv_transpose2d import CONV_TRANSPOSE2D, PackedConvTranspose2d, SearchableConvTranspose2d
from fliqs_hf.nn.kinds.convolution import Convolution
from fliqs_hf.nn.kinds.kind import (
    LayerKind,
    find_kind,
    kind_of,
    kinds,
    known_classes,
    plain_kind,
    register_kind,
    unregister_kind,
)
from fliqs_hf.nn.kinds.linear import LINEAR, PackedLinear, SearchableLinear
from fliqs_hf.nn.kinds.transposed_linear import TRANSPOSED_LINEAR, PackedTransposedLinear, SearchableTransposedLinear

__all__ = [
    "CONV1D",
    "CONV2D",
    "CONV_TRANSPOSE2D",
    "LINEAR",
    "TRANSPOSED_LINEAR",
    "Convolution",
    "LayerKind",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConvTranspose2d",
    "PackedLinear",
    "PackedTransposedLinear",
    "SearchableConv1d",
    "SearchableConv2d",
    "SearchableConvTranspose2d",
    "SearchableLinear",
    "SearchableTransposedLinear",
    "find_kind",
    "kind_of",
    "kinds",
    "known_classes",
    "plain_kind",
    "register_kind",
    "unregister_kind",
]
