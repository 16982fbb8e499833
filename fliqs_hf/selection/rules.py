"""Rules on the formats of layers by pattern, as arguments have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fliqs_hf.errors import ConfigError


def parse_rules(require: Sequence[str] | None, min_bits: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of `SearchSpace`.

    Args: require: texts "PATTERN=FORMAT" or "PATTERN=FORMAT,FORMAT". min_bits: texts "PATTERN=BITS".
    Raises: ConfigError: another text, a pattern that is given twice, or no number.
    """
    bits = {}
    for pattern, value in _pairs("min_bits", min_bits).items():
        try:
            bits[pattern] = float(value)
        except ValueError as error:
            raise ConfigError(f"min_bits: {pattern}={value}: {value!r} is no number of bits") from error
    named = {pattern: value.split(",") for pattern, value in _pairs("require", require).items()}
    return {"require": named, "min_bits": bits}


def rule_texts(rules: Mapping[str, Any] | None) -> list[str] | None:
    """What `parse_rules` reads, of one argument of `SearchSpace`. Raises: ConfigError: it is no mapping."""
    if not rules:
        return None
    if not isinstance(rules, Mapping):
        raise ConfigError(f"{rules!r}: give patterns of layer names, each with formats or a number of bits")
    values = {key: value if isinstance(value, (list, tuple)) else [value] for key, value in rules.items()}
    return [f"{pattern}={','.join(map(str, some))}" for pattern, some in values.items()]


def _pairs(name: str, given: Sequence[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given or ():
        pattern, _, value = text.rpartition("=")
        if not (pattern and value):
            raise ConfigError(f"{name}: {text!r}: give PATTERN=VALUE, such as 'classifier=8'")
        if pattern in found:
            raise ConfigError(f"{name} has {pattern!r} more than once")
        found[pattern] = value
    return found
