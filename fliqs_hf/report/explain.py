"""Why each decision of a search came out as it did: what the neighbouring formats would have cost and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import LayerInfo
from fliqs_hf.cost.models import registered
from fliqs_hf.errors import CheckpointError
from fliqs_hf.formats import Format, parse
from fliqs_hf.json_file import read_objects
from fliqs_hf.selection.changes import Change
from fliqs_hf.selection.neighbours import neighbours


@dataclass(frozen=True)
class Alternative:
    """Another format for one decision, everything else as it is.

    Attributes:
        signal: change of the accuracy signal, higher is worse; None where none was recorded (see `Explanation`).
        measured: change of the loss of the delivered model, where that was measured.
        costs: change of every registered cost that is known, by its name.
    """

    format: Format
    signal: float | None
    costs: Mapping[str, float]
    measured: Change | None = None


@dataclass(frozen=True)
class Explanation:
    """One decision of the search.

    Attributes:
        kind: what it decides of its layers: "both", "weight" or "activation".
        score: expected increase of the loss by the chosen format, from the sensitivity pass; None without one.
        probability: of the chosen format in the last recorded policy; None without a record.
        down, up: the best of the formats with the next fewer and next more bits. same: the best other of equal bits.
            "Best" is the least score or, without scores, the highest probability; where alternatives were measured, of
            those that were. Their `signal` is the change of the score or, without scores, of −log-probability. None
            where the space has no such format.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    format: Format
    score: float | None
    probability: float | None
    down: Alternative | None
    same: Alternative | None
    up: Alternative | None


def explain(
    space: Mapping[str, Any],
    layers: Sequence[LayerInfo],
    allocation: Mapping[str, LayerFormats],
    scores: Mapping[str, Sequence[float]],
    probabilities: Mapping[str, Sequence[float]],
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Explanation]:
    """All decisions of a run.

    Args:
        space: as in `search_space.json`. scores: decision -> [K], may be empty. probabilities: likewise, the last.
        measured: as in `alternatives.json`.
    Raises: CheckpointError: records that do not belong together.
    """
    by_name = {layer.name: layer for layer in layers}
    found = []
    try:
        for entry in space["decisions"]:
            own = [by_name[name] for name in entry["layers"]]
            parts = {_part(allocation[layer.name], entry["kind"]) for layer in own}
            if len(parts) != 1:
                raise CheckpointError(f"{entry['name']} is one decision, but its layers have different formats")
            found.append(
                _explanation(
                    entry,
                    layers,
                    own,
                    allocation,
                    parts.pop(),
                    scores.get(entry["name"]),
                    probabilities.get(entry["name"]),
                    (measured or {}).get(entry["name"], {}),
                )
            )
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CheckpointError(f"the records of this run do not belong together: {error!r}") from error
    return found


def _part(formats: LayerFormats, kind: str) -> Format:
    fmt = formats.activation if kind == "activation" else formats.weight
    if fmt is None:
        raise CheckpointError("a searched layer has no activation format")
    return fmt


def _explanation(
    entry: Mapping[str, Any],
    every: Sequence[LayerInfo],
    layers: list[LayerInfo],
    allocation: Mapping[str, LayerFormats],
    chosen: Format,
    scores: Sequence[float] | None,
    probabilities: Sequence[float] | None,
    measured: Mapping[str, Any],
) -> Explanation:
    choices = [parse(name) for name in entry["choices"]]
    excluded = {parse(name) for name in entry.get("excluded", ())}
    now = choices.index(chosen)
    signals: list[float] | None = None
    if scores is not None:
        signals = [float(score) for score in scores]
    elif probabilities is not None:
        signals = [-math.log(max(p, 1e-5)) for p in probabilities]  # recorded to five places

    allowed = [fmt not in excluded and (not measured or fmt.name in measured) for fmt in choices]
    others = {
        way: Alternative(
            choices[k],
            signals[k] - signals[now] if signals else None,
            changed_costs(every, layers, allocation, entry["kind"], chosen, choices[k]),
            Change(**measured[choices[k].name]) if measured else None,
        )
        for way, k in neighbours(choices, allowed, now, signals).items()
    }
    return Explanation(
        name=entry["name"],
        kind=entry["kind"],
        layers=tuple(entry["layers"]),
        format=chosen,
        score=None if scores is None else float(scores[now]),
        probability=None if probabilities is None else float(probabilities[now]),
        down=others.get("down"),
        same=others.get("same"),
        up=others.get("up"),
    )


def changed_costs(
    every: Sequence[LayerInfo],
    layers: Sequence[LayerInfo],
    allocation: Mapping[str, LayerFormats],
    kind: str,
    old: Format,
    new: Format,
) -> dict[str, float]:
    """What each registered cost that is known changes by when a decision of that kind on `layers` of the model's
    `every` layer takes another format."""
    pair = [{**allocation, **_with(layers, allocation, kind, fmt)} for fmt in (old, new)]
    names = {layer.name for layer in layers}
    found = {}
    for cost in registered():
        # What only sums over layers changes by them alone; the largest of all may be another one's.
        own = every if cost.peak is not None else layers
        shown = [{name: one[name] for name in one if cost.peak is not None or name in names} for one in pair]
        before, after = (cost.known(own, one) for one in shown)
        if before is not None and after is not None:
            found[cost.name] = after - before
    return found


def _with(
    layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats], kind: str, fmt: Format
) -> dict[str, LayerFormats]:
    """These layers with `fmt` in the decision's place."""
    changed = {}
    for layer in layers:
        weight, activation = allocation[layer.name].weight, allocation[layer.name].activation
        changed[layer.name] = LayerFormats(
            fmt if kind in ("both", "weight") else weight, fmt if kind in ("both", "activation") else activation
        )
    return changed


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A `.jsonl` record; empty where there is none. Raises: CheckpointError: a line that is no JSON object."""
    return read_objects(path) if path.exists() else []
