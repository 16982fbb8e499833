"""An independent oracle for number formats: rational arithmetic, by definition, slow.

It shares nothing with `fliqs_hf` but the names: values are enumerated from the bit layout as `fractions.Fraction`, and
rounding looks for the two values around a number and compares distances. No floating-point operation decides anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction


class Oracle:
    """One format, by name (`int4`, `e4m3`, `bf16`).

    `values[i]` is the i-th non-negative finite value, ascending; in float formats i is also its code.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if match := re.fullmatch(r"int(\d+)", name):
            self.bits = int(match[1])
            self.is_integer = True
            self.significands = list(range(2 ** (self.bits - 1)))
            self.values = [Fraction(value) for value in self.significands]
            return
        match = re.fullmatch(r"e(\d+)m(\d+)", {"bf16": "e8m7"}.get(name, name))
        assert match, name
        self.is_integer = False
        self.exponent_bits, self.mantissa_bits = int(match[1]), int(match[2])
        self.bits = 1 + self.exponent_bits + self.mantissa_bits
        self.significands, self.values = [], []
        self.specials: list[float] = []  # what the positive codes after the finite ones stand for
        for code in range(2 ** (self.bits - 1)):
            field, fraction = code >> self.mantissa_bits, code % 2**self.mantissa_bits
            special = self._special(field, fraction)
            if special is not None:
                self.specials.append(special)
                continue
            assert not self.specials, "finite codes come first"
            # Field 0 holds the subnormals: no hidden one, exponent of field 1.
            significand = fraction + (2**self.mantissa_bits if field else 0)
            exponent = max(field, 1) - (2 ** (self.exponent_bits - 1) - 1) - self.mantissa_bits
            self.significands.append(significand)
            self.values.append(significand * Fraction(2) ** exponent)

    def _special(self, field: int, fraction: int) -> float | None:
        if self.bits < 8:  # OCP MX: every code is finite
            return None
        top, last = field == 2**self.exponent_bits - 1, fraction == 2**self.mantissa_bits - 1
        if (self.exponent_bits, self.mantissa_bits) == (4, 3):  # OCP FP8 E4M3
            return math.nan if top and last else None
        if not top:
            return None
        return math.nan if fraction else math.inf

    def nearest(self, magnitudes: Sequence[Fraction]) -> list[int]:
        """Indices into `values` of the nearest values, saturating. `magnitudes`: non-negative, ascending.

        Ties: the even significand; where both are odd (formats with no mantissa bits) the larger value, as IEEE
        754-2019 section 4.3.1 has it.
        """
        values, indices, low = self.values, [], 0
        previous = Fraction(0)
        for x in magnitudes:
            assert x >= previous, "magnitudes must ascend"
            previous = x
            while low + 1 < len(values) and values[low + 1] <= x:
                low += 1
            if low + 1 == len(values):
                indices.append(low)
                continue
            above, below = values[low + 1] - x, x - values[low]
            if above == below:
                indices.append(low if self.significands[low] % 2 == 0 else low + 1)
            else:
                indices.append(low if below < above else low + 1)
        return indices

    def code(self, index: int, negative: bool) -> int:
        """Code of `values[index]`, or of its negative."""
        if self.is_integer:
            return -index % 2**self.bits if negative else index
        return index + (2 ** (self.bits - 1) if negative else 0)

    def all_codes(self) -> list[float]:
        """The value of every code, in order. The integer code that symmetric formats do not have is NaN."""
        positive = [float(value) for value in self.values]
        if self.is_integer:
            return [*positive, math.nan, *(-value for value in reversed(positive[1:]))]
        positive += self.specials
        return [*positive, *(-value for value in positive)]
