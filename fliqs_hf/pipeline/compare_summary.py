"""Table and figure of a comparison's CSV: mean ± standard deviation over seeds, wins and losses alike."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fliqs_hf.errors import DataError
from fliqs_hf.files import replacing, write_text
from fliqs_hf.optional import needed_for
from fliqs_hf.pipeline.compare_table import key_of, rows_of

NOTE = (
    "Mean ± standard deviation over seeds. Seconds include choosing the formats; peak MB is memory beyond what "
    "the model and the data took before."
)
HEAD = ("bits", "method", "{} %", "loss", "cost / target", "seconds", "peak MB", "seeds")


def summarise(path: Path) -> tuple[float | None, list[dict[str, Any]]]:
    """What was measured of the fp32 model if it is on record, and a row per target and method, best first.

    Raises: DataError: the file holds no results. CheckpointError: it is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    fp32 = next((float(found[1]) for line in lines if (found := re.match(r"# fp32: \w+ ([\d.]+),", line))), None)
    groups: dict[tuple[float, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows_of(path, lines):
        groups[float(row["target_bits"]), row["method"]].append(row)
    if not groups:
        raise DataError(f"{path} holds no results yet")
    table = []
    for (bits, method), rows in groups.items():
        values = [float(row["value"]) for row in rows]
        peaks = [float(row["peak_mb"]) for row in rows if row["peak_mb"]]
        table.append(
            {
                "bits": bits, "method": method, "value": mean(values),
                "std": stdev(values) if len(values) > 1 else None,
                "loss": mean(float(row["loss"]) for row in rows),
                "cost": mean(float(row["cost_ratio"]) for row in rows),
                "seconds": mean(float(row["seconds"]) for row in rows),
                "peak": mean(peaks) if peaks else None, "seeds": len(rows),
            }
        )  # fmt: skip
    return fp32, sorted(table, key=lambda row: (row["bits"], -row["value"]))


def measure_of(path: Path) -> str:
    """What was measured, in words."""
    key = key_of(path.read_text(encoding="utf-8").splitlines())
    return "top-1" if key == "top1" else key.replace("_", " ")


def markdown(fp32: float | None, table: list[dict[str, Any]], measure: str = "top-1") -> str:
    lines = [f"| {' | '.join(HEAD).format(measure)} |", "|---|---" + "|--:" * (len(HEAD) - 2) + "|"]
    for row in table:
        spread = "" if row["std"] is None else f" ± {100 * row['std']:.2f}"
        peak = "" if row["peak"] is None else f"{row['peak']:.0f}"
        lines.append(
            f"| {row['bits']:g} | {row['method']} | {100 * row['value']:.2f}{spread} | {row['loss']:.3f} "
            f"| {row['cost']:.3f} | {row['seconds']:.0f} | {peak} | {row['seeds']} |"
        )
    head = f"fp32: {fp32:.2%}. " if fp32 is not None else ""
    return f"{head}{NOTE}\n\n" + "\n".join(lines) + "\n"


def is_summary(head: str) -> bool:
    """Whether a file that begins like this is the table of a comparison."""
    return re.match(rf"(fp32: [\d.]+%\. )?{re.escape(NOTE)}\n", head) is not None


def write_summary(path: Path) -> str:
    """Write `.md` and `.png` beside the CSV. Returns: the table.

    Raises: DataError: the file holds no results.
    """
    with needed_for("the figure of a comparison"):
        from matplotlib.figure import Figure

    fp32, table = summarise(path)
    measure = measure_of(path)
    text = markdown(fp32, table, measure)
    write_text(path.with_suffix(".md"), text)
    bits = sorted({row["bits"] for row in table})
    methods = list(dict.fromkeys(row["method"] for row in sorted(table, key=lambda row: -row["value"])))
    figure = Figure(figsize=(2.4 + 2.2 * len(bits), 1.2 + 0.27 * len(methods)), layout="constrained")
    grid = figure.subplots(1, len(bits), sharey=True, squeeze=False)[0]
    for axes, target in zip(grid, bits, strict=True):
        for row in (row for row in table if row["bits"] == target):
            ours = row["method"].startswith("search")
            axes.errorbar(
                100 * row["value"], methods.index(row["method"]),
                xerr=None if row["std"] is None else 100 * row["std"],
                fmt="D" if ours else "o", color="#1d5fbf" if ours else "#4a5568", capsize=3, markersize=5,
            )  # fmt: skip
        if fp32 is not None:
            axes.axvline(100 * fp32, color="0.6", linestyle="--", linewidth=1, label="fp32")
        axes.set(title=f"cost of {target:g} bits", xlabel=f"{measure}, %")
        axes.grid(axis="y", color="#e6e9ee", linewidth=0.7)
    grid[0].set_yticks(range(len(methods)), methods)
    grid[0].invert_yaxis()
    if fp32 is not None:
        grid[-1].legend(frameon=False, fontsize=8)
    with replacing(path.with_suffix(".png")) as draft:
        figure.savefig(draft, dpi=150, facecolor="white")
    return text
