"""What a layer of an allocation is in the terms of another library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.errors import AllocationError
from fliqs_hf.formats import BlockFormat, Format, parse
from fliqs_hf.nn.kinds import LayerKind, kind_of

#: What libraries have with one scale for each channel or token, where there is nothing narrower.
_WIDE_INTEGER, _WIDE_FLOAT = parse("int8"), parse("e4m3")


@dataclass(frozen=True)
class Layer:
    """A layer that is to be expressed. Attributes: row: values that an output channel multiplies."""

    name: str
    formats: LayerFormats
    kind: LayerKind
    shape: torch.Size

    @property
    def row(self) -> int:
        return self.shape[1:].numel()


@dataclass(frozen=True)
class Counterpart:
    """What became of one layer.

    Attributes:
        weight, activation: its formats in the allocation, "fp32" for an input that is not quantized.
        became: what it is there, "unquantized" for nothing.
        changed: what is not as in the allocation, and why; "" where nothing is.
    """

    name: str
    weight: str
    activation: str
    became: str
    changed: str


def layers_of(model: Any, allocation: Allocation) -> list[Layer]:
    """Args: model: plain, on any device. Raises: AllocationError: a layer that the model does not have."""
    found, modules = [], dict(model.named_modules())
    for name, formats in allocation.items():
        if name not in modules:
            raise AllocationError(f"{type(model).__name__} has no layer {name!r}, which the allocation names")
        kind = kind_of(modules[name])
        found.append(Layer(name, formats, kind, kind.weight_shape(modules[name])))
    return found


def counterpart(layer: Layer, became: str, changes: list[str]) -> Counterpart:
    weight, activation = layer.formats.weight, layer.formats.activation
    return Counterpart(layer.name, str(weight), str(activation or "fp32"), became, "; ".join(changes))


def wider(fmt: Format) -> Format | None:
    """INT8 or E4M3 in place of a format that a library does not have, where it has as many values in every binade;
    of a format with scales of its own it loses those. None where neither does."""
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if element.is_integer:
        return _WIDE_INTEGER if element.bits <= _WIDE_INTEGER.bits else None
    fits = element.mantissa_bits <= _WIDE_FLOAT.mantissa_bits and element.min_exponent >= _WIDE_FLOAT.min_exponent
    return _WIDE_FLOAT if fits and element.bits <= _WIDE_FLOAT.bits else None


def unquantized(role: str, fmt: Format, library: str) -> str:
    """Why "weights" or "inputs" stay as they are."""
    if fmt.name == "bf16":
        return f"{role} stay unquantized: load the model in bf16"
    return f"{role} stay unquantized: {library} has no {fmt} here"
