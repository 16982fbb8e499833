"""A value from a settings file as the type of its argument has it."""

from __future__ import annotations

from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from fliqs_hf.errors import ConfigError


def as_type(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` has it: one value where a list is wanted becomes a list, "1e-4" a number.

    Raises: ConfigError: it is none of that type; it begins with `name`.
    """
    union = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if value is None and type(None) in union:
        return None
    if value is False and any("no" in get_args(wanted) for wanted in union):
        return "no"  # YAML reads the word as a truth value
    if isinstance(value, bool) and name.endswith("resume_from_checkpoint"):
        return str(value)
    for wanted in union:
        if wanted in (dict, bool):
            if isinstance(value, wanted):
                return value
        elif get_origin(wanted) is list:
            (item,) = get_args(wanted)
            return [as_type(name, v, item) for v in (value if isinstance(value, list) else [value])]
        elif (wanted is str and isinstance(value, str)) or (
            get_origin(wanted) is Literal and value in get_args(wanted)
        ):
            return value
        elif wanted in (int, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
            if wanted is int and isinstance(value, int):
                return value
            try:
                number = float(value)
            except (ValueError, OverflowError):
                continue
            if wanted is float or number.is_integer():
                return wanted(number)
    raise ConfigError(f"{name} has the value {value!r}, but must be {_words(hint)}")


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(get_args(hint))
    if isinstance(hint, UnionType) or get_origin(hint) is Union:
        return " or ".join(_words(t) for t in get_args(hint) if t is not type(None))
    return str(getattr(hint, "__name__", hint))
