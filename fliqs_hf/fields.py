"""Checking the types of a dataclass's fields, which Python does not."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fliqs_hf.errors import FliqsError


def check_fields(settings: Any, error: type[FliqsError], names: Iterable[str] | None = None) -> None:
    """Compare the fields of a dataclass with their annotations: int, float, bool, str, None, Literal, and unions.

    Args:
        names: only these fields.
    Raises: `error`: a field of another type or that is NaN, or not one of a Literal's values; it names both.
    """
    hints = get_type_hints(type(settings))
    for name in [field.name for field in fields(settings)] if names is None else names:
        value = getattr(settings, name)
        allowed = _alternatives(hints[name])
        if not any(_fits(value, kind) for kind in allowed):
            raise error(f"{name}={value!r} must be {' or '.join(map(_words, allowed))}")


def _alternatives(hint: Any) -> list[Any]:
    return list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return not isinstance(value, bool) and isinstance(value, Real) and not math.isnan(value)
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}.get(kind, "None")
