"""Which kernel a packed layer runs with, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fliqs_hf.nn.native import cuda
from fliqs_hf.nn.native.codes import STATIC_IMAGES, int8_shift, no_integer_product
from fliqs_hf.nn.native.int8 import largest_exact_weight

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer

#: "auto": the fastest kernel that a layer has on this machine; "reference": always the one that training simulates.
Kernels = Literal["auto", "reference"]


#: What is kept of the weights that no exact product takes: nothing, so that every forward pass decodes them, or their
#: values in floating point.
WeightCache = Literal["none", "decoded"]


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer, and why, in words.

    Attributes:
        kernel: "int8" for exact products of 8-bit integers, "fp8" for products of E4M3, "decoded" for the reference
            path with its weight decoded once and kept, "reference" for decoding in every pass.
    """

    kernel: Literal["int8", "fp8", "decoded", "reference"]
    reason: str


def choose(layer: PackedLayer) -> Choice:
    """The fastest kernel that `layer` has for inference on its device: an exact one, or one of the reference path's
    bits."""
    weight, activation = layer.formats.weight, layer.formats.activation
    device = layer.weight_codes.device.type
    if device not in ("cpu", "cuda"):
        return Choice("reference", f"no kernel for {device} yet")
    if obstacle := why_not_int8(layer) if device == "cpu" else cuda.obstacle(layer):
        return Choice("decoded" if layer.weight_cache == "decoded" else "reference", obstacle)
    if no_integer_product(layer):
        return Choice("fp8", f"{weight} and {activation} as E4M3")
    return Choice("int8", f"{weight} and {activation} as 8-bit integers, summed exactly")


def why_not_int8(layer: PackedLayer) -> str:
    """What keeps `layer` from exact products of 8-bit integers on this CPU; "" for nothing."""
    if reason := no_integer_product(layer):
        return reason
    if reason := layer.kind.not_a_product(layer):
        return reason
    if len(layer.kind.tokens.dims) > 1 and layer.settings.activation_granularity == "static":
        return STATIC_IMAGES
    weight, largest = layer.formats.weight, largest_exact_weight()
    if weight.max_value * 2 ** (int8_shift(weight) or 0) > largest:
        return f"this CPU sums int8 products exactly for weights up to {largest} only"
    return ""
