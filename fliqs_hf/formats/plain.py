"""The number formats that exist. Every constant is derived from the bit layout.

Integers and floats share one description, so that one rounding routine serves both. A value x is rounded to a
multiple of ``p * 2**-mantissa_bits`` with ``p = max(2**floor(log2 |x|), 2**min_exponent)``, then saturated at
``max_value``. A k-bit integer is the special case of a single binade: ``min_exponent = mantissa_bits = k - 2`` makes
the step 1 for every code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from fliqs_hf.checks import is_whole
from fliqs_hf.errors import FormatError
from fliqs_hf.formats.packing import MAX_BITS, packed_bytes


class _ScaledByChannel:
    """One float32 for each output channel of a weight: the scaling of formats that have none of their own."""

    if TYPE_CHECKING:

        @property
        def bits(self) -> int: ...
        @property
        def is_scaled(self) -> bool: ...

    @property
    def scales_itself(self) -> bool:
        return False

    @property
    def for_inputs_only(self) -> bool:
        return False

    @property
    def effective_bits(self) -> int:
        """`bits`: a scale per channel or token is shared by too many elements to count."""
        return self.bits

    def scale_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """[out] of a weight [out, ...]; no element where the format is used unscaled."""
        return (weight_shape[0] if self.is_scaled else 0,)

    def scale_bytes(self, weight_shape: Sequence[int]) -> int:
        return 4 * math.prod(self.scale_shape(weight_shape))

    def storage_bytes(self, weight_shape: Sequence[int]) -> int:
        """Bytes of a packed weight [out, ...] with its scales."""
        return packed_bytes(math.prod(weight_shape), self.bits) + self.scale_bytes(weight_shape)


@dataclass(frozen=True)
class IntFormat(_ScaledByChannel):
    """Symmetric two's-complement integer, codes -(2**(bits-1)-1) ... 2**(bits-1)-1.

    The most negative code, -2**(bits-1), is never produced and is refused on decoding.

    Raises: FormatError: `bits` outside 2...16.
    Source: FLIQS (Dotzel et al. 2024), section 3.
    """

    bits: int

    def __post_init__(self) -> None:
        if not is_whole(self.bits, 2, MAX_BITS):
            raise FormatError(f"int{self.bits!r}: an integer format has 2 to {MAX_BITS} bits")

    @cached_property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def is_integer(self) -> bool:
        return True

    @property
    def is_scaled(self) -> bool:
        return True

    @property
    def has_special_codes(self) -> bool:
        """Whether there are codes of no finite number: here -2**(bits-1)."""
        return True

    @property
    def mantissa_bits(self) -> int:
        """Fraction bits of the single binade (see the module's docstring)."""
        return self.bits - 2

    @property
    def min_exponent(self) -> int:
        return self.bits - 2

    @property
    def max_value(self) -> float:
        return float(2 ** (self.bits - 1) - 1)

    @property
    def smallest(self) -> float:
        """Smallest positive value, before scaling."""
        return 1.0

    @property
    def nan_code(self) -> None:
        """Integers have no NaN."""
        return None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloatFormat(_ScaledByChannel):
    """Sign, `exponent_bits`, `mantissa_bits`, with subnormals and signed zero.

    `specials` says which codes are not finite numbers:
        none  every code is a finite number (all formats below 8 bits, as in OCP MX v1.0, sections 5.3.2 and 5.3.3)
        nan   only the all-ones code is NaN, no infinity (E4M3, OCP FP8 v1.0, section 5)
        ieee  the all-ones exponent holds infinity and NaN (E5M2, E3M4, E5M10, BF16 and everything else)

    Raises: FormatError: fewer than 2 or more than 8 exponent bits, or more than 16 bits in all.
    """

    exponent_bits: int
    mantissa_bits: int

    def __post_init__(self) -> None:
        if not (is_whole(self.exponent_bits, 2, 8) and is_whole(self.mantissa_bits, 0) and self.bits <= MAX_BITS):
            raise FormatError(
                f"e{self.exponent_bits!r}m{self.mantissa_bits!r}: a float format has 2 to 8 exponent bits "
                f"and at most {MAX_BITS} bits including the sign"
            )

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @cached_property
    def name(self) -> str:
        return "bf16" if self == BF16 else f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def is_integer(self) -> bool:
        return False

    @property
    def is_scaled(self) -> bool:
        """Whether a scale maps the data's maximum to `max_value`: not where the range is that of float32."""
        return self.exponent_bits < 8

    @property
    def specials(self) -> Literal["none", "nan", "ieee"]:
        if self.bits < 8:
            return "none"
        return "nan" if (self.exponent_bits, self.mantissa_bits) == (4, 3) else "ieee"

    @property
    def has_special_codes(self) -> bool:
        """Whether there are codes of NaN or infinity."""
        return self.specials != "none"

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def max_code(self) -> int:
        """Code of the largest finite value (sign bit clear)."""
        all_ones = (1 << (self.bits - 1)) - 1
        return {"none": all_ones, "nan": all_ones - 1, "ieee": all_ones - (1 << self.mantissa_bits)}[self.specials]

    @property
    def max_value(self) -> float:
        exponent, fraction = divmod(self.max_code, 2**self.mantissa_bits)
        return float((1 + fraction / 2**self.mantissa_bits) * 2.0 ** (exponent - self.bias))

    @property
    def smallest(self) -> float:
        """Smallest positive value, before scaling (a subnormal where there are any)."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))

    @property
    def nan_code(self) -> int | None:
        """Code of the canonical quiet NaN (sign bit clear); None where no code is NaN (E7M0 has only infinity)."""
        if self.specials == "none" or (self.specials == "ieee" and self.mantissa_bits == 0):
            return None
        return self.max_code + 1 + (2 ** (self.mantissa_bits - 1) if self.specials == "ieee" else 0)

    def __str__(self) -> str:
        return self.name


BF16 = FloatFormat(8, 7)
