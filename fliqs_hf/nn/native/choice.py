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


@dataclass(frozen=True)
class Choice:
    """The kernel of a layer, "int8" or "reference", and why, in words."""

    kernel: Literal["int8", "reference"]
    reason: str


def choose(layer: PackedLayer) -> Choice:
    """The fastest kernel that is exact for `layer` on its device, for inference."""
    device = layer.weight_codes.device.type
    if device == "cpu":
        return _on_cpu(layer)
    return Choice("reference", f"no kernel for {device} yet")


def _on_cpu(layer: PackedLayer) -> Choice:
    weight, activation = layer.formats.weight, layer.formats.activation
    if activation is None:
        return Choice("reference", "the input is not quantized")
    for role, fmt in (("weights", weight), ("inputs", activation)):
        if int8_shift(fmt) is None:
            return Choice("reference", f"{role} in {fmt} are no 8-bit integers")
    if layer.settings.activation_granularity == "static":
        return Choice("reference", "a static input scale, which would not show NaN in the input")
    if reason := layer.not_a_product:
        return Choice("reference", reason)
    if layer.weight_shape[1:].numel() >= LONGEST_SUM:
        return Choice("reference", f"sums of {layer.weight_shape[1:].numel()} products may exceed 32 bits")
    largest = largest_exact_weight()
    if weight.max_value * 2 ** (int8_shift(weight) or 0) > largest:
        return Choice("reference", f"this CPU sums int8 products exactly for weights up to {largest} only")
    return Choice("int8", f"{weight} and {activation} as 8-bit integers, summed exactly")
