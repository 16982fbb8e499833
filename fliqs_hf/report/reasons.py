"""Which constraint or trade-off decided each format, in a sentence with its figures.

The allocation is the optimum of a sum of scores within limits on costs. So of every decision can be said what it would
bring to change it alone: *down*, to a format that costs less of what is scarcest, adds to the score, at a price that
is compared with what the other decisions would gain per unit of cost if their last exchange were undone; *up*, to the
format of the lowest score, takes more of a limit than is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import CostTable, LayerInfo, Target, target_kinds, weight_bytes
from fliqs_hf.cost.models import BOPS, find
from fliqs_hf.cost.target import given_targets
from fliqs_hf.errors import CheckpointError, FliqsError
from fliqs_hf.formats import Format, parse
from fliqs_hf.nn.select import matches
from fliqs_hf.report.explain import changed_costs
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.wording import figure, percent

_WORDS = {
    "bops": "bit operations", "weight_bytes": "checkpoint", "memory_bytes": "memory", "energy_uj": "energy",
    "latency_ms": "time",
}  # fmt: skip


@dataclass(frozen=True)
class Bound:
    """A limit on a cost, or a target from below.

    Attributes:
        cost: by name. said: in words, such as "size_mb 3". now, most: of the whole model, in the unit of the cost.
    """

    cost: str
    said: str
    now: float
    most: float

    @property
    def word(self) -> str:
        return _WORDS.get(self.cost, self.cost)


@dataclass(frozen=True)
class _Step:
    """Another format for one decision: what the score and the costs change by."""

    format: Format
    score: float
    costs: Mapping[str, float]


@dataclass(frozen=True)
class _Decision:
    name: str
    layers: tuple[str, ...]
    chosen: Format
    steps: tuple[_Step, ...]  # to every other format that is allowed
    excluded: tuple[Format, ...]


def reasons(
    space: Mapping[str, Any],
    layers: Sequence[LayerInfo],
    allocation: Mapping[str, LayerFormats],
    signals: Mapping[str, Sequence[float]],
    bounds: Sequence[Bound],
    rules: Mapping[str, str],
    signal: str = "predicted loss",
) -> dict[str, str]:
    """A sentence per decision, by its name; none for those without signals.

    Args:
        space: as in `search_space.json`. signals: decision -> [K], lower is better, in the order of its formats.
        bounds: what was to be kept; the one that is used up most is what formats are exchanged for.
        rules: pattern of layer names -> the argument that forbids formats to those that match, as it was given.
        signal: what the signals are.
    """
    by_name = {layer.name: layer for layer in layers}
    found = [
        _decision(entry, layers, [by_name[name] for name in entry["layers"]], allocation, signals[entry["name"]])
        for entry in space["decisions"]
        if entry["name"] in signals
    ]
    scarce = max(bounds, key=lambda bound: bound.now / bound.most, default=None)
    told = {}
    for one in found:
        rule = next((said for pattern, said in rules.items() if any(matches(n, pattern) for n in one.layers)), None)
        others = [other for other in found if not set(other.layers) & set(one.layers)]
        told[one.name] = _sentence(one, others, scarce, bounds, rule, signal)
    return told


def _decision(
    entry: Mapping[str, Any],
    every: Sequence[LayerInfo],
    own: Sequence[LayerInfo],
    allocation: Mapping[str, LayerFormats],
    signals: Sequence[float],
) -> _Decision:
    kind, first = entry["kind"], allocation[own[0].name]
    chosen = first.activation if kind == "activation" else first.weight
    assert chosen is not None, "`explain` has refused it"
    formats = [parse(name) for name in entry["choices"]]
    excluded = tuple(parse(name) for name in entry.get("excluded", ()))
    now = signals[formats.index(chosen)]
    steps = tuple(
        _Step(fmt, score - now, changed_costs(every, own, allocation, kind, chosen, fmt))
        for fmt, score in zip(formats, signals, strict=True)
        if fmt != chosen and fmt not in excluded
    )
    return _Decision(entry["name"], tuple(entry["layers"]), chosen, steps, excluded)


def _sentence(
    one: _Decision,
    others: Sequence[_Decision],
    scarce: Bound | None,
    bounds: Sequence[Bound],
    rule: str | None,
    signal: str,
) -> str:
    if not one.steps:
        return f"{one.chosen} is the only format it may have" + (f": held by {rule}." if rule else ".")
    down, up = _down(one, others, scarce, bounds, signal), _up(one, bounds, signal)
    if down is None:
        why = f"held by {rule}" if rule and one.excluded else "the space has nothing that costs less here"
        down = f"{one.chosen} is as cheap as it may be ({why})"
    return f"{down}; {up}."


def _down(
    one: _Decision, others: Sequence[_Decision], scarce: Bound | None, bounds: Sequence[Bound], signal: str
) -> str | None:
    """Of the cheaper format that adds least to the score for what it saves."""
    if scarce is None:
        return None
    cheaper = [step for step in one.steps if step.costs.get(scarce.cost, 0.0) < 0]
    if not cheaper:
        return None
    step = min(cheaper, key=lambda step: step.score / -step.costs[scarce.cost])
    saved = -step.costs[scarce.cost]
    text = (
        f"{step.format} instead of {one.chosen} would {_change(step.score, signal)} for "
        f"{percent(saved / scarce.now)} of the {scarce.word}"
    )
    made = [price for other in others if (price := _undone(other, scarce)) is not None]
    if not made:
        return f"{text}, and nothing needs what it saves"
    below = sum(price <= step.score / saved for price in made)
    if below == len(made):
        return f"{text}, dearer than the {below} exchanges made elsewhere"
    rest = f"{text}, dearer than {below} of the {len(made)} exchanges made elsewhere"
    if any(_pays(step, back, bounds) for other in others for back in other.steps):
        return f"{rest}: by the scores alone another one would have been better, and training decided otherwise"
    return f"{rest}, and it saves too little to undo one of the dearer ones"


def _undone(one: _Decision, scarce: Bound) -> float | None:
    """What its last exchange gave up per unit of cost: the most that a dearer format would gain; None where none."""
    gains = [
        -step.score / more for step in one.steps if step.score < 0 and (more := step.costs.get(scarce.cost, 0)) > 0
    ]
    return max(gains, default=None)


def _pays(step: _Step, back: _Step, bounds: Sequence[Bound]) -> bool:
    """Whether both together lower the score within the limits."""
    if step.score + back.score >= 0:
        return False
    return all(
        step.costs.get(bound.cost, 0.0) + back.costs.get(bound.cost, 0.0) <= bound.most - bound.now for bound in bounds
    )


def _up(one: _Decision, bounds: Sequence[Bound], signal: str) -> str:
    """Of the format of the lowest score."""
    best = min(one.steps, key=lambda step: step.score)
    if best.score >= 0:
        return "no format it may have is better"
    text = f"{best.format} would {_change(best.score, signal)}"
    for bound in bounds:
        more, left = best.costs.get(bound.cost, 0.0), max(0.0, bound.most - bound.now)
        if more > left:
            return (
                f"{text} and takes {percent(more / bound.now)} more of the {bound.word}, of which "
                f"{percent(left / bound.now)} is left: held by {bound.said}"
            )
    return f"{text} within every limit, and was outweighed by what training showed"


def _change(score: float, signal: str) -> str:
    return f"{'add' if score >= 0 else 'take'} {abs(score):.3g} {'to' if score >= 0 else 'off'} the {signal}"


def bounds_of(run: FinishedRun, space: Mapping[str, Any]) -> list[Bound]:
    """What the run was to keep, in the units of the costs: targets and limits whose cost is known here. A floor alone
    has none, and its allocation is the best at its own bit operations.

    Raises: CheckpointError: targets or a space that are none.
    """
    named = {name for entry in space["decisions"] for name in entry["layers"]}
    searched = [layer for layer in run.layers if layer.name in named]
    if not searched:
        return []
    allocation = Allocation({name: formats for name, formats in run.allocation.items() if name in named})
    found = []
    try:
        wanted = {kind: value for kind, value in run.results.target.items() if kind not in ("cost", "cap")}
        wanted |= {kind: values[0] for kind, values in _limits(run).items()}
        for kind, value in (wanted or ({"bops": None} if run.results.floor else {})).items():
            if kind not in target_kinds() and value is not None:
                continue  # a cost that is registered nowhere now
            cost = BOPS if value is None else find(Target(kind, value).cost_kind)
            if cost.known(run.layers, run.allocation) is None:
                continue
            fixed: float
            if cost.of_file and run.results.checkpoint_bytes is not None:
                fixed = run.results.checkpoint_bytes - weight_bytes(run.layers, run.allocation)
            else:
                fixed = sum(cost.layer(layer, None) for layer in run.layers if layer.name not in named)
            peak = max((cost.peak_of(layer, None) for layer in run.layers if layer.name not in named), default=0.0)
            table = CostTable(searched, space["formats"], cost, fixed_cost=fixed, fixed_peak=peak,
                              alike=space.get("activation") == "same")  # fmt: skip
            now = table.of(allocation)
            most = now if value is None else Target(kind, value).in_cost(table)
            said = "the floor of accuracy" if value is None else f"target {kind} {figure(value)}"
            found.append(Bound(cost.name, said, now, most))
    except (FliqsError, KeyError, TypeError) as error:
        raise CheckpointError(f"the targets of {run.path} do not go with its records: {error}") from error
    return found


def _limits(run: FinishedRun) -> dict[str, list[float]]:
    """Of a search, those that were known by a cost that is known here."""
    told = run.settings.arguments.get("limits") or []
    return given_targets({"target": [text for text in told if str(text).partition("=")[0] in target_kinds()]})


def rules_of(run: FinishedRun) -> dict[str, str]:
    """Pattern of layers -> the argument that forbids formats to those that match."""
    found = {}
    for name in ("require", "min_bits"):
        for text in run.settings.arguments.get(name) or []:
            found[str(text).rpartition("=")[0]] = f"--{name} {text}"
    return found
