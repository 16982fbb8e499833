"""Which kernel a packed layer runs with, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fliqs_hf.nn.native.codes import int8_shift
from fliqs_hf.nn.native.int8 import LONGEST_SUM, largest_exact_weight

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
        kernel: "int8" for exact products of 8-bit integers, "decoded" for the reference path with its weight decoded
            once and kept, "reference" for decoding in every pass.
    """

    kernel: Literal["int8", "decoded", "reference"]
    reason: str


def choose(layer: PackedLayer) -> Choice:
    """The fastest kernel that `layer` has for inference on its device: an exact one, or one of the reference path's
    bits."""
    device = layer.weight_codes.device.type
    if device != "cpu":
        return Choice("reference", f"no kernel for {device} yet")
    if obstacle := why_not_int8(layer):
        return Choice("decoded" if layer.weight_cache == "decoded" else "reference", obstacle)
    weight, activation = layer.formats.weight, layer.formats.activation
    return Choice("int8", f"{weight} and {activation} as 8-bit integers, summed exactly")


def no_integer_product(layer: PackedLayer) -> str:
    """What keeps `layer` from exact products of 8-bit integers on any machine; "" for nothing."""
    weight, activation = layer.formats.weight, layer.formats.activation
    if activation is None:
        return "the input is not quantized"
    for role, fmt in (("weights", weight), ("inputs", activation)):
        if int8_shift(fmt) is None:
            return f"{role} in {fmt} are no 8-bit integers"
    if layer.weight_shape[1:].numel() >= LONGEST_SUM:
        return f"sums of {layer.weight_shape[1:].numel()} products may exceed 32 bits"
    return ""


def why_not_int8(layer: PackedLayer) -> str:
    """What keeps `layer` from exact products of 8-bit integers on this CPU; "" for nothing."""
    if reason := no_integer_product(layer):
        return reason
    if reason := layer.kind.not_a_product(layer):
        return reason
    if len(layer.kind.tokens.dims) > 1 and layer.settings.activation_granularity == "static":
        return "a static scale of images, which would not show NaN in one patch"
    weight, largest = layer.formats.weight, largest_exact_weight()
    if weight.max_value * 2 ** (int8_shift(weight) or 0) > largest:
        return f"this CPU sums int8 products exactly for weights up to {largest} only"
    return ""
