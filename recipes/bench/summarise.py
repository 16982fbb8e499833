"""Table and figure of a CSV that `compare.py` wrote: mean ± standard deviation over seeds, wins and losses alike.

    python recipes/bench/summarise.py recipes/bench/results/compare-digits.csv

Writes the table as Markdown to standard output, and a PNG beside the CSV.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import pandas

matplotlib.use("Agg")
from matplotlib import pyplot


def main(path: Path) -> None:
    rows = pandas.read_csv(path, comment="#")
    fp32 = next(line for line in path.read_text().splitlines() if line.startswith("# fp32"))
    groups = rows.groupby(["target_bits", "method"])
    table = groups.agg(
        top1=("top1", "mean"), std=("top1", "std"), loss=("loss", "mean"), cost=("cost_ratio", "mean"),
        seconds=("seconds", "mean"), seeds=("seed", "nunique"),
    ).reset_index()  # fmt: skip
    table = table.sort_values(["target_bits", "top1"], ascending=[True, False])
    print(f"{fp32[2:]}\n\n| bits | method | top-1 % | loss | cost / target | seconds | seeds |")
    print("|---|---|---|---|---|---|---|")
    for row in table.itertuples():
        print(
            f"| {row.target_bits:g} | {row.method} | {100 * row.top1:.2f} ± {100 * row.std:.2f} | {row.loss:.3f} "
            f"| {row.cost:.3f} | {row.seconds:.0f} | {row.seeds} |"
        )
    figure, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    for number, (method, part) in enumerate(table.groupby("method")):
        shift = 0.04 * (number - table.method.nunique() / 2)  # error bars beside each other
        axes.errorbar(
            part.target_bits + shift,
            100 * part.top1,
            100 * part["std"],
            fmt="o",
            capsize=3,
            markersize=4,
            label=method,
        )
    axes.axhline(100 * float(fp32.split("top1 ")[1].split(",")[0]), color="0.5", linestyle="--", label="fp32")
    axes.set(xlabel="target: bit operations of the uniform model of so many bits", ylabel="top-1, %")
    axes.set_xticks(sorted(table.target_bits.unique()))
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path.with_suffix(".png"), dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
