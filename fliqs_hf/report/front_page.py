"""The front of a model: what every budget buys, as a figure and as a page without scripts."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost.models import Cost
from fliqs_hf.optional import needed_for
from fliqs_hf.report.run_figures import ACCENT, BASELINE, GRID, INK, MUTED
from fliqs_hf.wording import percent

with needed_for("the figure of a front"):
    import matplotlib as mpl
    from matplotlib.figure import Figure


class Point(NamedTuple):
    """Cost in its unit, expected increase of the loss, name of the allocation's file, and the right answers of the
    packed model with the ends of their interval, where it was measured; fractions."""

    cost: float
    increase: float
    name: str
    allocation: Allocation
    accuracy: tuple[float, float, float] | None = None


_WIDTH, _HEIGHT, _MARGIN, _TOP = 640, 320, 56, 40
_STYLE = (
    f"body{{font:16px/1.5 system-ui;color:{INK};margin:1.2rem auto;padding:0 1rem;max-width:46rem}}"
    f"svg{{width:100%;height:auto}}text{{font-size:13px;fill:{MUTED}}}circle{{fill:{ACCENT}}}"
    f"circle.accuracy{{fill:{BASELINE}}}a:hover circle,a:focus circle{{r:10}}"
    "@media (max-width:30rem){h1{font-size:1.5rem}text{font-size:22px}circle{r:9}}"
)


def front_figure(curves: Mapping[Cost, Sequence[Point]]) -> Figure:
    """One panel per cost, both axes in logarithms; below them one of measured accuracies, where there are any."""
    measured = any(point.accuracy for points in curves.values() for point in points)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.0 * len(curves), 6.4 if measured else 3.6), layout="constrained")
        panels = figure.subplots(1 + measured, len(curves), squeeze=False)
        for column, (cost, points) in enumerate(curves.items()):
            axes = panels[0][column]
            axes.plot([point.cost for point in points], [max(point.increase, 1e-12) for point in points], "o-",
                      color=ACCENT)  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=cost.unit, ylabel="expected increase of the loss")
            if measured:
                own = [(point.cost, *point.accuracy) for point in points if point.accuracy]
                _accuracies(panels[1][column], own)
                panels[1][column].set(xscale="log", xlabel=cost.unit, ylabel="top-1, % (95 % interval)")
        for axes in panels.flat:
            axes.grid(color=GRID)
    return figure


def _accuracies(axes: Any, points: Sequence[tuple[float, float, float, float]]) -> None:
    cost, value, low, high = ([100 * number for number in column] for column in zip(*points, strict=True))
    bars = [[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]]
    axes.errorbar([number / 100 for number in cost], value, yerr=bars, fmt="o-", color=BASELINE, capsize=3)


def page(curves: Mapping[Cost, Sequence[Point]]) -> str:
    """A self-contained page: a point tells its formats where the mouse rests, and a click saves its allocation."""
    parts = "".join(f"<h2>By {escape(cost.unit)}</h2>{_drawings(cost, points)}" for cost, points in curves.items())
    measured = any(point.accuracy for points in curves.values() for point in points)
    said = (
        "The lower drawing has the top-1 accuracy of those that were packed and measured, with 95 % intervals."
        if measured else "No accuracy was measured."
    )  # fmt: skip
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>What every budget buys</title>'
        f"<style>{_STYLE}</style>"
        "<h1>What every budget buys</h1><p>Each point is the allocation of least expected loss at its cost, from one "
        f"pass over calibration images. {said} Rest on a point for its formats; click it to save the allocation that "
        f"<code>fliqs-hf quantize --allocation</code> takes.</p>{parts}</html>\n"
    )


def _drawings(cost: Cost, points: Sequence[Point]) -> str:
    """Of the expected loss, and of the accuracies that were measured."""
    x = _scaled([_log(point.cost) for point in points], _MARGIN, _WIDTH - 16)
    y = _scaled([_log(point.increase) for point in points], _HEIGHT - _MARGIN, _TOP)
    dots = [(a, b, point, None) for a, b, point in zip(x, y, points, strict=True)]
    ends = [f"+{function(point.increase for point in points):.3g}" for function in (max, min)]
    text = _drawing(cost, points, dots, "expected increase of the loss", ends, "")
    own = [(a, point, point.accuracy) for a, point in zip(x, points, strict=True) if point.accuracy]
    if not own:
        return text
    low, high = min(found[1] for *_, found in own), max(found[2] for *_, found in own)
    span = (high - low) or 1.0

    def height(value: float) -> float:
        return _HEIGHT - _MARGIN + (value - low) / span * (_TOP + _MARGIN - _HEIGHT)

    marks = [(a, height(found[0]), point, (height(found[1]), height(found[2]))) for a, point, found in own]
    return text + _drawing(cost, points, marks, "top-1, measured", [percent(high), percent(low)], "accuracy")


def _drawing(
    cost: Cost,
    points: Sequence[Point],
    dots: Sequence[tuple[float, float, Point, tuple[float, float] | None]],
    title: str,
    ends: Sequence[str],
    kind: str,
) -> str:
    """Args: dots: x, y, the point, and the ends of its interval. ends: highest and lowest value of the axis."""
    bars = "".join(
        f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{bar[0]:.1f}" y2="{bar[1]:.1f}" stroke="{MUTED}"/>'
        for a, _, _, bar in dots
        if bar is not None
    )
    marks = "".join(
        f'<a href="{_data(point.allocation)}" download="{escape(point.name)}.json"><circle class="{kind}" '
        f'cx="{a:.1f}" cy="{b:.1f}" r="6"><title>{escape(_said(cost, point))}</title></circle></a>'
        for a, b, point, _ in dots
    )
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b, *_ in dots)
    low, high = (escape(cost.show(points[end].cost)) for end in (0, -1))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)} by {escape(cost.unit)}">'
        f'<polyline points="{line}" fill="none" stroke="{MUTED}"/>{bars}{marks}'
        f'<text x="4" y="18">{escape(ends[0])} {escape(title)}</text>'
        f'<text x="4" y="{_HEIGHT - _MARGIN + 22}">{escape(ends[1])}</text>'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 8}">{low} {escape(cost.unit)}</text>'
        f'<text x="{_WIDTH - 4}" y="{_HEIGHT - 8}" text-anchor="end">{high}</text></svg>'
    )  # fmt: skip


def _said(cost: Cost, point: Point) -> str:
    text = f"{point.name}: {cost.show(point.cost)} {cost.unit}, loss +{point.increase:.3g}"
    if point.accuracy:
        value, low, high = map(percent, point.accuracy)
        text += f", top-1 {value} ({low} to {high})"
    return f"{text}\n{point.allocation.summary()}"


def _data(allocation: Allocation) -> str:
    """The allocation's file, as an address."""
    text = json.dumps(allocation.to_dict(), indent=2) + "\n"
    return f"data:application/json;base64,{base64.b64encode(text.encode()).decode()}"


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    least, span = min(values), (max(values) - min(values)) or 1.0
    return [low + (value - least) / span * (high - low) for value in values]
