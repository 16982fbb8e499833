"""Which formats a decision is compared with: the best of the next fewer, of as many and of the next more bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fliqs_hf.formats import Format

Way = Literal["down", "same", "up"]
WAYS: tuple[Way, ...] = ("down", "same", "up")


def neighbours(
    formats: Sequence[Format], allowed: Sequence[bool], chosen: int, signals: Sequence[float] | None = None
) -> dict[Way, int]:
    """
    Args:
        allowed: whether the decision may have each of `formats`. chosen: the index of the one that it has.
        signals: of each, lower is better; without them the first of as many bits is taken.
    Returns: indices into `formats`, of the ways that exist.
    """
    bits = formats[chosen].bits
    rows = [k for k in range(len(formats)) if allowed[k] and k != chosen]
    fewer = [formats[k].bits for k in rows if formats[k].bits < bits]
    more = [formats[k].bits for k in rows if formats[k].bits > bits]
    found: dict[Way, int] = {}
    for way, wanted in zip(WAYS, (max(fewer, default=None), bits, min(more, default=None)), strict=True):
        if level := [k for k in rows if formats[k].bits == wanted]:
            found[way] = min(level, key=lambda k: signals[k]) if signals is not None else level[0]
    return found
