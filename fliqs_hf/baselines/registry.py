"""Baselines of one's own: a name that comparisons know, and an allocation for every problem and seed."""

from __future__ import annotations

from collections.abc import Callable

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.selection import SearchProblem

#: Problem and seed -> an allocation of its space.
Baseline = Callable[[SearchProblem, int], Allocation]

_BASELINES: dict[str, Baseline] = {}


def register_baseline(name: str, choose: Baseline) -> None:
    """Make a baseline known to comparisons as `name`, trained, and as `ptq-<name>`, untrained.

    Raises: ConfigError: another one of this name, or what is no name.
    """
    if not (isinstance(name, str) and name.replace("-", "_").isidentifier()) or name.startswith("ptq-"):
        raise ConfigError(f"the name of a baseline is a word such as 'first-layers', not {name!r}")
    if _BASELINES.setdefault(name, choose) is not choose:
        raise ConfigError(f"a baseline {name!r} is registered already: choose another name, or unregister it")


def unregister_baseline(name: str) -> None:
    """Forget a baseline. Raises: ConfigError: it is none."""
    if name not in _BASELINES:
        raise ConfigError(f"{name!r} is no baseline that was registered")
    del _BASELINES[name]


def baselines() -> dict[str, Baseline]:
    """All that are registered, by name."""
    return dict(_BASELINES)
