"""What a value must be before it is used: comparisons with a string, NaN or 10**400 are tracebacks, not errors."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fliqs_hf.errors import FliqsError

_LARGEST = sys.float_info.max


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """An int or float (no bool) within [low, high], and finite as a float."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and max(low, -_LARGEST) <= value <= min(high, _LARGEST)  # type: ignore[operator]


def is_whole(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """An int (no bool) within [low, high]."""
    return isinstance(value, int) and is_number(value, low, high)


def check_fields(settings: Any, error: type[FliqsError], names: Iterable[str] | None = None) -> None:
    """Compare the fields of a dataclass with their annotations: int, float, bool, str, None, Literal, unions of
    them, and lists and dicts of all these.

    Args:
        names: only these fields.
    Raises: `error`: a field of another type or that is NaN, or not one of a Literal's values; it names both.
    """
    hints = get_type_hints(type(settings))
    for name in [field.name for field in fields(settings)] if names is None else names:
        value = getattr(settings, name)
        if not _fits(value, hints[name]):
            raise error(f"{name}={value!r:.200} must be {_words_of(hints[name])}")


def _alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _fits(value: Any, hint: Any) -> bool:
    return any(_is(value, kind) for kind in _alternatives(hint))


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        of_key, of_value = get_args(kind)
        return isinstance(value, dict) and all(
            _fits(key, of_key) and _fits(item, of_value) for key, item in value.items()
        )
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, kind)


def _words_of(hint: Any) -> str:
    return " or ".join(map(_words, _alternatives(hint)))


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list, each item {_words_of(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"an object, each value {_words_of(get_args(kind)[1])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(kind, "None")
