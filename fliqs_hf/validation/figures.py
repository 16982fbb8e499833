"""The figures of a validation page, as SVG text to put into HTML."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from markupsafe import Markup

from fliqs_hf.hf.gate import Gate
from fliqs_hf.optional import needed_for
from fliqs_hf.validation.statistics import ConfidenceCalibration

with needed_for("the figures of a validation"):
    import matplotlib as mpl
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID = "#1f2430", "#5b6472", "#d8dce3"
_COLOURS = {"pass": "#1a7f4b", "fail": "#b3261e", "undecided": "#946200"}
_SERIES = {"original": "#4a5568", "quantized": "#1d5fbf"}


def drop_figure(drop: float, interval: tuple[float, float], gate: Gate | None, measure: str = "top-1") -> Markup:
    """A drop in percentage points: estimate, bootstrap interval, and the gate if there is one."""

    def draw(axes: Any) -> None:
        axes.axvline(0, color=_GRID, linewidth=1, zorder=0)
        rows = ["paired bootstrap"]
        axes.plot([100 * bound for bound in interval], [0, 0], color=_SERIES["quantized"], linewidth=3)
        axes.plot(100 * drop, 0, "o", color=_SERIES["quantized"], markersize=7)
        if gate is not None:
            rows.append("gate bounds")
            colour = _COLOURS[gate.verdict]
            axes.plot([100 * gate.lower, 100 * gate.upper], [1, 1], "|-", color=colour, linewidth=3, markersize=12)
            axes.axvline(100 * gate.max_drop, color=colour, linestyle="--", linewidth=1.5)
            axes.annotate("limit", (100 * gate.max_drop, 1.45), color=colour, ha="left", va="center",
                          xytext=(4, 0), textcoords="offset points")  # fmt: skip
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(len(rows) - 0.3, -0.6)
        axes.set_xlabel(f"drop of {measure}, points (left is better)")

    return _svg(draw, (4.4, 1.1 if gate is None else 1.6), "drop")


def calibration_figure(calibration: ConfidenceCalibration, model: str) -> Markup:
    """Accuracy against confidence per bin, with the share of images; on the diagonal a model knows what it knows."""

    def draw(axes: Any) -> None:
        total = sum(calibration.counts)
        width = calibration.edges[1] - calibration.edges[0]
        axes.bar(calibration.edges[:-1], [count / total for count in calibration.counts], width, align="edge",
                 color=_GRID, edgecolor="white")  # fmt: skip
        axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=":")
        filled = [(c, a) for c, a in zip(calibration.confidence, calibration.accuracy, strict=True) if c is not None]
        axes.plot(*zip(*filled, strict=True), "o-", color=_SERIES[model], markersize=4)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy; share of images")

    return _svg(draw, (3.4, 2.9), model)


def _svg(draw: Callable[[Any], None], size: tuple[float, float], salt: str) -> Markup:
    """`salt` keeps the identifiers of several figures on one page apart, and the same from run to run."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": _MUTED,
        "ytick.color": _INK,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # safe: made here, of numbers and fixed text
