"""The figures of a run's report, drawn once and written as SVG (into the page) or PNG (for the model card)."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fliqs_hf.files import disk_errors, replacing
from fliqs_hf.formats import Format, parse
from fliqs_hf.optional import needed_for
from fliqs_hf.records import PolicyStep

with needed_for("a report"):
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

if TYPE_CHECKING:
    from fliqs_hf.hf.results import MeasuredAccuracy
    from fliqs_hf.report.run_report import RunReport

INK, MUTED, GRID, SOFT = "#1f2430", "#5b6472", "#d8dce3", "#f0f2f5"
ACCENT, BASELINE = "#1d5fbf", "#946200"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": INK,
}


def colour(fmt: Format) -> str:
    """Integers are blue, floating-point formats orange; the more bits, the darker."""
    depth = 0.2 + 0.75 * (min(fmt.bits, 8) - 2) / 6
    return mpl.colors.to_hex(mpl.colormaps["Blues" if fmt.is_integer else "Oranges"](depth))


def text_colour(fmt: Format) -> str:
    """Readable on `colour(fmt)`."""
    red, green, blue = mpl.colors.to_rgb(colour(fmt))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.6 else INK


def allocation_figure(report: RunReport) -> Figure:
    """Along the network: bits of weights upwards and of inputs downwards, and each layer's share of the MACs."""
    rows = report.rows
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(max(7.0, 0.17 * len(rows) + 1.2), 4.4), layout="constrained")
        bars, macs = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        where = range(len(rows))
        for role, sign in (("weight", 1), ("activation", -1)):
            formats = [getattr(row.formats, role) if row.formats else None for row in rows]
            bars.bar(
                where, [sign * (fmt.effective_bits if fmt else 32) for fmt in formats], width=0.86,
                color=[colour(fmt) if fmt else SOFT for fmt in formats], edgecolor=MUTED, linewidth=0.3,
            )  # fmt: skip
        bars.axhline(0, color=INK, linewidth=0.8)
        top = max([8, *(fmt.effective_bits for fmt in report.formats)]) + 0.5
        bars.set_ylim(-top, top)
        ticks = [t for t in range(-32, 33, 4) if abs(t) <= top]
        bars.set_yticks(ticks, [str(abs(tick)) for tick in ticks])
        bars.set_ylabel("input bits  |  weight bits")
        swatches = [(colour(fmt), fmt.name.upper()) for fmt in report.formats]
        if any(row.formats is None or row.formats.activation is None for row in rows):
            swatches.append((SOFT, "FP32"))
        handles = [Patch(facecolor=ink, edgecolor=MUTED, linewidth=0.3, label=name) for ink, name in swatches]
        columns = min(len(handles), int(figure.get_figwidth() / 0.95))  # of a swatch with a name of six characters
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)
        total = sum(row.macs for row in rows)
        macs.bar(where, [100 * row.macs / total for row in rows], width=0.86, color=MUTED)
        macs.set_ylabel("MACs, %")
        starts = _blocks([row.name for row in rows])
        macs.set_xticks([start for start, _ in starts], [name for _, name in starts], rotation=45, ha="right")
        for start, _ in starts:
            for axes in (bars, macs):
                axes.axvline(start - 0.5, color=GRID, linewidth=0.7, zorder=0)
        macs.set_xlim(-0.6, len(rows) - 0.4)
        return figure


def _interval(accuracy: MeasuredAccuracy) -> list[list[float]] | None:
    """Below and above the value, in percent."""
    if accuracy.low is None or accuracy.high is None:
        return None
    return [[100 * (accuracy.value - accuracy.low)], [100 * (accuracy.high - accuracy.value)]]


def cost_figure(report: RunReport) -> Figure | None:
    """Accuracy against bit operations of every model of the results, with Wilson intervals; None without them."""
    points = [(point, point.accuracy, point.bops) for point in report.results if point.accuracy and point.bops]
    if len(points) < 2:
        return None
    interval = "" if points[0][1].low is None else " (95 % Wilson interval)"
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        taken: list[float] = []
        for point, accuracy, bops in points:
            # Side by side where costs are equal, or the intervals hide one another.
            place = bops * 1.09 ** sum(abs(other / bops - 1) < 0.03 for other in taken)
            taken.append(bops)
            searched = point.name == "searched"
            ink = ACCENT if searched else MUTED if point.name == "fp32" else BASELINE
            axes.errorbar(
                place / 1e9, 100 * accuracy.value, yerr=_interval(accuracy),
                fmt="D" if searched else "o", color=ink, capsize=3, markersize=7 if searched else 5,
                label=point.label,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set(xlabel="bit operations per image, G (log scale)", ylabel=f"{points[0][1].measure}, %{interval}")
        figure.legend(frameon=False, loc="outside upper left", ncols=3)
        return figure


_CURVES = {
    "loss": "training loss",
    "reward": "reward",
    "cost_ratio": "cost of sampled allocations / target",
    "entropy": "entropy of the policy, nats",
}


def curves_figure(metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Loss, reward, cost and entropy over the steps; shaded: training in the final allocation. None if nothing is."""
    names = [name for name in _CURVES if any(name in entry for entry in metrics)]
    if not names:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 2.0 * ((len(names) + 1) // 2)), layout="constrained")
        grid = figure.subplots((len(names) + 1) // 2, 2, sharex=True, squeeze=False)
        final = [entry["step"] for entry in metrics if entry.get("phase") == "final"]
        for axes, name in zip(grid.flat, names, strict=False):
            points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
            axes.plot(*zip(*points, strict=True), color=ACCENT, linewidth=1.4, marker="." if len(points) < 15 else "")
            if final:
                axes.axvspan(final[0], metrics[-1]["step"], color=SOFT, zorder=0)
            if name == "cost_ratio":
                axes.axhline(1, color=MUTED, linestyle=":", linewidth=1)
            axes.set_title(_CURVES[name], fontsize=9, loc="left")
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        for axes in grid[-1]:
            axes.set_xlabel("step")
        return figure


def policy_figure(policy: Sequence[PolicyStep], formats: Sequence[str], columns: int = 3) -> Figure | None:
    """Probability of every format over the steps, one small panel per decision; None where nothing was recorded."""
    if not policy or not policy[0].probabilities:
        return None
    parsed = [parse(name) for name in formats]
    order = sorted(range(len(parsed)), key=lambda k: (parsed[k].bits, not parsed[k].is_integer))
    names = list(policy[0].probabilities)
    steps = [entry.step for entry in policy]
    if len(steps) == 1:  # one record has no width
        policy, steps = [policy[0], policy[0]], [0, steps[0]]
    rows = -(-len(names) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 0.95 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(grid.flat, names, strict=False):
            values = [[entry.probabilities[name][k] for entry in policy] for k in order]
            axes.stackplot(steps, values, colors=[colour(parsed[k]) for k in order], linewidth=0)
            axes.set_title(_short(name), fontsize=7, loc="left", pad=2)
            axes.set(xlim=(steps[0], steps[-1]), ylim=(0, 1), yticks=[0, 1])
            axes.tick_params(labelsize=7)
        for axes in list(grid.flat)[len(names) :]:
            axes.set_visible(False)
        handles = [Patch(facecolor=colour(parsed[k]), label=parsed[k].name.upper()) for k in order]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 9), frameon=False, fontsize=8)
        return figure


def svg(figure: Figure | None, salt: str) -> Markup | None:
    """For HTML. `salt` keeps the identifiers of several figures on one page apart, and the same from run to run."""
    if figure is None:
        return None
    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])  # safe: Matplotlib escapes the texts in it


def write_png(figure: Figure | None, path: Path) -> None:
    """Write it, or remove what an earlier report left where there is nothing to draw any more."""
    if figure is None:
        with disk_errors(path):
            path.unlink(missing_ok=True)
        return
    with mpl.rc_context(_STYLE), replacing(path) as draft:
        figure.savefig(draft, dpi=150, facecolor="white")


def _blocks(names: Sequence[str]) -> list[tuple[int, str]]:
    """Where each block begins, and the end of its name: that up to the first number, or the layer's own."""
    starts: list[tuple[int, str]] = []
    last = None
    for index, name in enumerate(names):
        match = re.match(r"(.*?\.\d+)\.", name)
        block = match[1] if match else name
        if block != last:
            starts.append((index, ".".join(block.split(".")[-2 if match else -1 :])))
        last = block
    return starts


def _short(name: str, limit: int = 38) -> str:
    """The end of a long module name, which tells layers apart."""
    if len(name) <= limit:
        return name
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > limit:
        parts = parts[1:]
    return "…" + ".".join(parts)[-limit:]
