"""Checking a quantization config that comes from a checkpoint: nothing in it is a path or a program, or endless."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fliqs_hf.errors import AllocationError, ConfigError

MAX_NAMES = 100_000
MAX_NAME = 500
MAX_FORMAT = 40


def check_stored(config: Mapping[str, Any]) -> None:
    """Raises: ConfigError, AllocationError: a path in place of an allocation, a regular expression among the patterns,
    or an entry of another type or size than this package writes.
    """
    allocation = config.get("allocation")
    if allocation is not None:
        if not isinstance(allocation, Mapping):
            raise AllocationError(
                f"the allocation stored in a checkpoint maps layer names to formats; {allocation!r:.100} is a "
                f"{type(allocation).__name__}, and no path is ever opened for one"
            )
        _bounded("allocation", allocation)
        for name, entry in allocation.items():
            if isinstance(entry, Mapping):
                for value in entry.values():
                    _format(f"allocation of {name!r}", value)
    for key in ("weight_format", "activation_format"):
        _format(key, config.get(key))
    for key in ("weight_granularity", "weight_scale", "activation_granularity", "checksum"):
        if key in config and not isinstance(config[key], str):
            raise ConfigError(f"{key}={config[key]!r:.100} is no name")
    _patterns("modules_to_not_convert", config.get("modules_to_not_convert"), (list, tuple))
    _patterns("overrides", config.get("overrides"), Mapping)
    _folded(config.get("folded"))
    _digests(config.get("digests"))


def _bounded(key: str, names: Any) -> None:
    if len(names) > MAX_NAMES:
        raise ConfigError(f"{key}: {len(names):,} entries are more than {MAX_NAMES:,}")
    for name in names:
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise ConfigError(f"{key}: {name!r:.100} is no name of at most {MAX_NAME} characters")


def _format(key: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_FORMAT:
        raise ConfigError(f"{key}: {value!r:.60}… is no format: it has {len(value):,} characters")


def _patterns(key: str, patterns: Any, expected: Any) -> None:
    if patterns is None:
        return
    if not isinstance(patterns, expected):
        raise ConfigError(f"{key}={patterns!r:.100} is of the wrong type")
    _bounded(key, patterns)
    for pattern in patterns:
        if pattern.startswith("re:") or pattern.count("*") > MAX_FORMAT:
            raise ConfigError(
                f"{key}: {pattern!r} comes from a checkpoint, and no regular expression that does is ever run: "
                "name the layers instead"
            )


def _folded(folded: Any) -> None:
    if folded is None:
        return
    if not isinstance(folded, Mapping):
        raise ConfigError(f"folded={folded!r:.100} maps convolutions to batch norms; the file is damaged")
    for names in (folded, folded.values()):
        _bounded("folded", names)
    if len(set(folded.values())) < len(folded):
        raise ConfigError("folded: one batch norm is of several convolutions; the file is damaged")


def _digests(digests: Any) -> None:
    if digests is None:
        return
    if not isinstance(digests, Mapping) or set(digests) != {"settings", "tensors"}:
        raise ConfigError(f"digests={digests!r:.100}: expected those of settings and tensors; the file is damaged")
    for key, values in digests.items():
        if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
            raise ConfigError(f"digests of {key} map names to digests; the file is damaged")
        _bounded(f"digests of {key}", values)
