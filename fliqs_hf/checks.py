"""What a setting must be before it is used: comparisons with a string, NaN or 10**400 are tracebacks, not errors."""

from __future__ import annotations

import math
import sys

_LARGEST = sys.float_info.max


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """An int or float (no bool) within [low, high], and finite as a float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and max(low, -_LARGEST) <= value <= min(high, _LARGEST)  # type: ignore[operator]


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """An int (no bool) within [low, high]."""
    return isinstance(value, int) and is_number(value, low, high)
