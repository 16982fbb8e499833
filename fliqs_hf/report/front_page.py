"""The front of a model: what every budget buys, as a figure and as a page without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from fliqs_hf.cost.models import Cost
from fliqs_hf.optional import needed_for
from fliqs_hf.report.run_figures import ACCENT, GRID, INK, MUTED
from fliqs_hf.wording import engineering

with needed_for("the figure of a front"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

#: Cost in its unit, expected increase of the loss, name of the allocation's file, its formats.
Point = tuple[float, float, str, str]
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 56
_STYLE = (
    f"body{{font:15px system-ui;color:{INK};margin:2rem;max-width:46rem}}circle{{fill:{ACCENT}}}circle:hover{{r:9}}"
)


def front_figure(curves: Mapping[Cost, Sequence[Point]]) -> Figure:
    """One panel per cost; both axes in logarithms."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(5.0 * len(curves), 3.6), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (cost, points) in zip(panels, curves.items(), strict=True):
            axes.plot([point[0] for point in points], [max(point[1], 1e-12) for point in points], "o-", color=ACCENT)
            axes.set(xscale="log", yscale="log", xlabel=cost.unit, ylabel="expected increase of the loss")
            axes.grid(color=GRID)
    return figure


def page(curves: Mapping[Cost, Sequence[Point]]) -> str:
    """A self-contained page: a point tells its formats where the mouse rests, and a click opens its allocation."""
    parts = "".join(f"<h2>By {escape(cost.unit)}</h2>{_drawing(cost, points)}" for cost, points in curves.items())
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>What every budget buys</title>"
        f"<style>{_STYLE}</style>"
        "<h1>What every budget buys</h1><p>Each point is the allocation of least expected loss at its cost, from one "
        "pass over calibration images. No accuracy was measured. Rest on a point for its formats; click it for an "
        f"allocation that <code>fliqs-hf quantize --allocation</code> takes.</p>{parts}</html>\n"
    )


def _drawing(cost: Cost, points: Sequence[Point]) -> str:
    x = _scaled([_log(point[0]) for point in points], _MARGIN, _WIDTH - _MARGIN)
    y = _scaled([_log(point[1]) for point in points], _HEIGHT - _MARGIN, _MARGIN)
    dots = "".join(
        f'<a href="{escape(name)}.json"><circle cx="{a:.1f}" cy="{b:.1f}" r="6"><title>{escape(name)}: '
        f"{escape(cost.show(value))} {escape(cost.unit)}, loss +{engineering(loss)}\n{escape(formats)}</title>"
        "</circle></a>"
        for a, b, (value, loss, name, formats) in zip(x, y, points, strict=True)
    )
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="front by {escape(cost.unit)}">'
        f'<polyline points="{line}" fill="none" stroke="{MUTED}"/>{dots}'
        f'<text x="{_MARGIN}" y="{_HEIGHT - 16}" fill="{MUTED}">{escape(cost.show(points[0][0]))} → '
        f'{escape(cost.show(points[-1][0]))} {escape(cost.unit)}</text></svg>'
    )  # fmt: skip


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _scaled(values: Sequence[float], low: float, high: float) -> list[float]:
    least, span = min(values), (max(values) - min(values)) or 1.0
    return [low + (value - least) / span * (high - low) for value in values]
