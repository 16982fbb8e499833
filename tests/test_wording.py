"""Numbers as people read them: no exponents, no negative zero, one rounding everywhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from fliqs_hf import wording
from fliqs_hf.cost.target import described


@pytest.mark.parametrize(("function", "value", "text"), [
    (wording.milliseconds, 20900.0, "20.9 s"),
    (wording.milliseconds, 20.94, "20.9 ms"),
    (wording.milliseconds, 999.6, "1 s"),
    (wording.milliseconds, 0.206, "206 µs"),
    (wording.duration, 321.5, "5 min 22 s"),
    (wording.duration, 99.94, "99.9 s"),
    (wording.duration, 99.96, "1 min 40 s"),
    (wording.duration, 3599.6, "1 h 0 min"),
    (wording.duration, 7300.0, "2 h 2 min"),
    (wording.duration, 400_000.0, "4 days 15 h"),
    (wording.duration, 0.0, "0 µs"),
    (wording.size, 999_400, "999 kB"),
    (wording.size, 999_600, "1 MB"),
    (wording.size, 512, "512 B"),
    (wording.size, None, "not measured"),
    (wording.engineering, 1234567, "1.23 M"),
    (wording.engineering, 999.6, "1 k"),
    (wording.engineering, 0.00001, "0.000"),
    (wording.signed, -1234567, "−1.23 M"),
    (wording.points, -0.00001, "0.00"),
    (wording.points, -0.0123, "−1.23"),
    (wording.change, 0.0123, "+1.23"),
    (wording.speed, 1.7, "1.7 × faster"),
    (wording.speed, 0.32, "3.1 × slower"),
    (wording.speed, 1.04, "as fast"),
    (wording.smaller, 0.5, "2.0 × larger"),
    (wording.factor, 64.2, "64 ×"),
    (wording.figure, 20_900_000.0, "20,900,000"),
    (wording.figure, 19200, "19200"),
    (wording.figure, 0.00005, "0.000050000"),
    (wording.figure, 3.5, "3.5"),
    (wording.p_value, 0.00012, "0.00012"),
    (wording.p_value, 1e-9, "< 0.0001"),
    (wording.thousandths, 1e-8, "0.000"),
    (wording.thousandths, 25.0, "25 k"),
    (wording.signal, -1e-3, "−1"),
    (wording.level, 0.95, "95 %"),
    (described, {"bits": 3.0, "cost": 2e7, "cap": False}, "the bit operations of a uniform 3-bit model"),
    (described, {"bops": 1.5e6}, "1.5 M bit operations per image"),
    (described, {"size_mb": 2.5}, "a checkpoint of at most 2.5 MB"),
    (described, {"ratio": 1 / 64}, "1.56 % of the bit operations of fp32"),
    (described, {"latency": 3}, "latency 3"),
])  # fmt: skip
def test_numbers_in_human_units(function: Callable[[Any], str], value: Any, text: str) -> None:
    assert function(value) == text


def test_no_number_has_an_exponent() -> None:
    plain = (
        wording.milliseconds,
        wording.duration,
        wording.size,
        wording.engineering,
        wording.short,
        wording.factor,
        wording.figure,
    )
    for function in plain:
        for power in range(-9, 13):
            for digits in (1.0, 3.1415, 9.9996):
                assert not re.search(r"\de[+-]?\d", function(digits * 10.0**power)), (function, digits, power)
