"""Formats that bring their own scales: one for each block of neighbours, and one-sided integers with a zero point.

A block is `block` neighbours along the dimension that a layer sums over; the last one of a row is shorter where the
row is no multiple of it. What a scale can be is a format too:
    e8m0  a power of two, 8 bits: the largest one that leaves max |x| below twice the element's leading binade
          (OCP MX v1.0, section 6.3), so values of more than `max_value` scales saturate
    e4m3  8 bits, and one float32 for all of a tensor that brings the largest scale to 448 (NVFP4)
    bf16  16 bits: the range of float32, so that no block over- or underflows, as half precision would; its 8 digits
          move a scale by 0.2 % at most, which is 1/64 of a step of INT4
    fp32  as it is, for what is scaled by the token
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fliqs_hf.errors import FormatError
from fliqs_hf.formats.packing import packed_bytes
from fliqs_hf.formats.plain import FloatFormat, IntFormat

ScaleKind = Literal["e8m0", "e4m3", "bf16", "fp32"]

SCALE_BITS: dict[ScaleKind, int] = {"e8m0": 8, "e4m3": 8, "bf16": 16, "fp32": 32}
GROUPS = (16, 32, 64, 128)


@dataclass(frozen=True)
class BlockFormat:
    """Elements of one format with a scale for each block; codes and their values are those of the element.

    Attributes:
        name: as `parse` takes it.
        element: of the codes.
        block: elements that share a scale; None for a whole token (a whole image in a convolution).
        scale: the format of the scales.
        zero_point: unsigned codes from 0 to 2**bits - 1 minus a zero point of as many bits, for inputs alone.

    Raises: FormatError: a zero point of elements that are no integers of at most 8 bits; or no block without one.
    Source: OCP Microscaling Formats v1.0, sections 5 and 6; NVIDIA's NVFP4.
    """

    name: str
    element: IntFormat | FloatFormat
    block: int | None
    scale: ScaleKind
    zero_point: bool = False

    def __post_init__(self) -> None:
        if self.zero_point and not (self.element.is_integer and self.element.bits <= 8):
            raise FormatError(f"{self.name}: zero points are of integers of at most 8 bits")
        if self.block is None and not self.zero_point:
            raise FormatError(f"{self.name}: a format without blocks or zero point is the plain {self.element}")

    @property
    def scales_itself(self) -> bool:
        """Whether settings of granularity and calibrated input scales are without a meaning for it."""
        return True

    @property
    def bits(self) -> int:
        """Of an element, without its share of the scales; see `effective_bits`."""
        return self.element.bits

    @property
    def effective_bits(self) -> float:
        """Bits of an element with its share of the scales and zero points of a full block, a multiple of 1/128.

        One number for a whole tensor or token is not counted, as it is not for other formats.
        """
        if self.block is None:
            return self.bits
        return self.bits + (SCALE_BITS[self.scale] + self.bits * self.zero_point) / self.block

    @property
    def is_integer(self) -> bool:
        return self.element.is_integer

    @property
    def is_scaled(self) -> bool:
        return True

    @property
    def has_special_codes(self) -> bool:
        return self.element.has_special_codes

    @property
    def mantissa_bits(self) -> int:
        return self.element.mantissa_bits

    @property
    def min_exponent(self) -> int:
        return self.element.min_exponent

    @property
    def max_value(self) -> float:
        """Of an element, before scaling; with a zero point the width of the range."""
        return float(2**self.bits - 1) if self.zero_point else self.element.max_value

    @cached_property
    def max_exponent(self) -> int:
        """Of the largest element."""
        return math.frexp(self.element.max_value)[1] - 1

    @property
    def smallest(self) -> float:
        return self.element.smallest

    @property
    def nan_code(self) -> int | None:
        return self.element.nan_code

    @property
    def for_inputs_only(self) -> bool:
        """Whether no weight can have it."""
        return self.zero_point

    def scale_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """[out, blocks] of a weight [out, ...], whose blocks run along all that an output channel multiplies."""
        row = math.prod(weight_shape[1:])
        return weight_shape[0], -(-row // (self.block or max(row, 1)))

    def scale_bytes(self, weight_shape: Sequence[int]) -> int:
        """Bytes of all scales of a weight, the one float32 of E4M3 scales included."""
        scales = math.prod(self.scale_shape(weight_shape)) * SCALE_BITS[self.scale] // 8
        return scales + (4 if self.scale == "e4m3" else 0)

    def storage_bytes(self, weight_shape: Sequence[int]) -> int:
        """Bytes of a packed weight [out, ...] with its scales."""
        return packed_bytes(math.prod(weight_shape), self.bits) + self.scale_bytes(weight_shape)

    def __str__(self) -> str:
        return self.name


_MX: dict[str, IntFormat | FloatFormat] = {
    "mxfp4": FloatFormat(2, 1),
    "mxfp6_e2m3": FloatFormat(2, 3),
    "mxfp6_e3m2": FloatFormat(3, 2),
    "mxfp8_e4m3": FloatFormat(4, 3),
    "mxfp8_e5m2": FloatFormat(5, 2),
    "mxint8": IntFormat(8),
}

#: The block formats with names of their own.
NAMED: dict[str, BlockFormat] = {
    **{name: BlockFormat(name, element, 32, "e8m0") for name, element in _MX.items()},
    "nvfp4": BlockFormat("nvfp4", FloatFormat(2, 1), 16, "e4m3"),
}


def integer_blocks(bits: int, group: int | None, zero_point: bool) -> BlockFormat:
    """INTk in groups, with a zero point, or both: `int4_g32`, `int4_zp`, `int4_g32_zp`.

    Raises: FormatError: a group of another size.
    """
    if group is not None and group not in GROUPS:
        raise FormatError(f"int{bits}_g{group}: groups are of {', '.join(map(str, GROUPS))}")
    name = f"int{bits}" + (f"_g{group}" if group else "") + ("_zp" if zero_point else "")
    return BlockFormat(name, IntFormat(bits), group, "bf16" if group else "fp32", zero_point)
