"""The names of methods that a comparison knows, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fliqs_hf.baselines.registry import baselines
from fliqs_hf.errors import ConfigError, FormatError, did_you_mean
from fliqs_hf.formats import COMMON, Format, parse
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.selection import scores

METHODS = ("uniform-int", "uniform-fp", "random-no-int2", "loss-delta", "fisher", "search", "paper")
UNIFORM = ("uniform-int", "uniform-fp", "manual")
RANDOM = ("random", "random-no-int2")
#: Methods that give weights and inputs one format only -> why.
ONE_FORMAT = {
    "differentiable": "branches would be squared in number",
    "gumbel": "branches would be squared in number",
}
TRAINED = ("differentiable", "gumbel", "multi-trial-random", "multi-trial-optuna")
#: First letter of a part of a search's name, such as `x2` -> the setting that its number is of.
SETTINGS = {
    "": "explore_fraction", "x": "samples_per_step", "h": "prior_entropy", "k": "prior_strength",
    "l": "policy_learning_rate", "p": "prior_passes",
}  # fmt: skip
_WHOLE = ("samples_per_step", "prior_passes")
_CHANGED = "search-… takes " + ", ".join(f"{letter}NUMBER ({name})" for letter, name in SETTINGS.items())
FLOATS = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e2m3", 7: "e3m3", 8: "e4m3"}


def uniform_format(method: str) -> Format | None:
    """The format that a method gives every layer whatever the target is: `ptq-uniform-e4m3` -> E4M3, others none.

    Raises: ConfigError: `uniform-` and something that is no format, or none of weights.
    """
    name = method.removeprefix("ptq-")
    if not name.startswith("uniform-") or name in (*UNIFORM, *scores(), *baselines()):
        return None
    try:
        found = parse(name.removeprefix("uniform-"))
    except FormatError as error:
        raise ConfigError(f"{_unknown(method)} ({error})") from error
    if found.for_inputs_only:
        raise ConfigError(
            f"method {method!r}: {found.name} is for inputs only, and a uniform model has it for weights"
        )
    return found


def runs(methods: Iterable[str], targets: Iterable[float], seeds: Iterable[int]) -> list[tuple[str, float, int]]:
    """(method, bits, seed) of the rows of a comparison, in order, each once.

    A method that gives every layer one format ignores the targets: its bits are those of the format. `uniform-int`,
    `uniform-fp` and `manual` exist for whole bits from 3 to 8 only.
    """
    methods, seeds, found = list(methods), list(seeds), []
    for bits in targets:
        for seed in seeds:
            for method in methods:
                if (fmt := uniform_format(method)) is not None:
                    prefix = "ptq-" if method.startswith("ptq-") else ""
                    found.append((f"{prefix}uniform-{fmt.name}", float(fmt.bits), seed))
                elif bits in FLOATS or method.removeprefix("ptq-") not in UNIFORM:
                    found.append((method, bits, seed))
    return list(dict.fromkeys(found))


def search_config(method: str) -> SearchConfig:
    """The configuration that a method's name means. Raises: ConfigError: it means none, and why."""
    kind, *parts = method.split("-")
    if kind == "paper" and parts:
        raise ConfigError(
            f"method {method!r}: {parts[0]!r} does not exist, as paper is FLIQS as published; {_CHANGED}"
        )
    changes: dict[str, Any] = {}
    for part in parts:
        found = re.fullmatch(r"([a-z]?)([0-9]+\.?[0-9]*|\.[0-9]+)", part)
        name = None if found is None else SETTINGS.get(found[1])
        if found is None or name is None:
            raise ConfigError(f"method {method!r}: {part!r} does not exist; {_CHANGED}")
        if name in changes:
            raise ConfigError(f"method {method!r}: {part!r} sets {name} a second time: leave one of them out")
        value = float(found[2])
        changes[name] = int(value) if name in _WHOLE and value.is_integer() else value
    try:
        return SearchConfig.preset("paper" if kind == "paper" else "default", **changes)
    except ConfigError as error:
        raise ConfigError(f"method {method!r}: {error}") from error


def is_search(method: str) -> bool:
    """Whether a method is named as a one-shot search, and is none that was registered under such a name."""
    return method.partition("-")[0] in ("search", "paper") and method not in (*scores(), *baselines())


def check_methods(methods: Iterable[str], activation: str = "same", granularity: str = "per_token") -> None:
    """Raises: ConfigError: a method that does not exist, or not for such a space, before anything has run."""
    for method in methods:
        if activation == "separate" and (reason := _one_format(method.removeprefix("ptq-"))):
            raise ConfigError(f"{method} takes --activation same only: {reason}")
        if granularity != "per_token" and (method in ("differentiable", "gumbel") or method.startswith("ptq-")):
            raise ConfigError(f"{method} takes --activation_granularity per_token only: it learns no factors")
        chosen_untrained = method.removeprefix("ptq-") in (*UNIFORM, *scores(), *RANDOM, *baselines())
        if chosen_untrained or method in TRAINED or uniform_format(method) is not None:
            continue
        if not is_search(method):
            raise ConfigError(_unknown(method))
        search_config(method)


def _one_format(name: str) -> str | None:
    score = scores().get(name)
    if score is not None and score.weights_only:
        return "it scores weights, and nothing would choose the formats of inputs"
    return ONE_FORMAT.get(name)


def _unknown(method: str) -> str:
    untrained = (*UNIFORM, *scores(), *RANDOM, *baselines(), *(f"uniform-{fmt.name}" for fmt in COMMON))
    known = (*untrained, *(f"ptq-{name}" for name in untrained), *TRAINED, "search", "paper")
    return f"unknown method {method!r}{did_you_mean(method, known, '--help lists them')}"
