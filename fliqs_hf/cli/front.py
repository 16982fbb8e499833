"""`fliqs-hf front`."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fliqs_hf.baselines.front import FrontPoint, sensitivity_front
from fliqs_hf.cli.calibration import CalibrationImages
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.targets import settle
from fliqs_hf.cost import LayerInfo, unlisted_bytes
from fliqs_hf.cost.latency import LatencyTable, use
from fliqs_hf.cost.models import Cost, find, known_costs
from fliqs_hf.errors import ConfigError
from fliqs_hf.files import write_text
from fliqs_hf.pipeline.checkpoints import device_of, load_model, load_processor, read_config, traced
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.pipeline.outputs import check_apart, check_writable, data_source
from fliqs_hf.pipeline.post_training import allocate
from fliqs_hf.report.front_page import front_figure, page
from fliqs_hf.report.run_figures import write_png
from fliqs_hf.wording import engineering


class FrontRow(NamedTuple):
    """A point of the front by one cost."""

    by: str
    name: str
    costs: dict[str, float | None]
    increase: float
    summary: str


def front(args: argparse.Namespace) -> int:
    """Raises: ConfigError: a folder with something in it, an unknown cost, a model that cannot be searched."""
    folder = Path(args.output)
    check_apart(folder, {"MODEL": args.model, "--calibration": data_source(args.calibration)})
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists: choose a folder that is new or empty")
    check_writable(folder)
    if args.latency_table is not None:
        use(table_of_times := LatencyTable.load(args.latency_table))
    costs = [find(name) for name in dict.fromkeys(args.costs)]
    settle(args, "same")
    if read_config(args.model, args.revision)[1] is not None:
        raise ConfigError(f"{args.model} is quantized already; start from the fp32 checkpoint")
    processor = load_processor(args.model, args.revision)
    model = load_model(args.model, args.revision).to(device_of(args.device))
    if args.latency_table is not None:
        table_of_times.check(traced(model)[0])
    images = CalibrationImages(args, model, processor)
    found = allocate(
        model,
        images.labelled,
        costs[0].name,
        search_space=args.search_space,
        activation=args.activation,
        task=images.task,
    )
    points = {
        cost: sensitivity_front(
            search_problem(model, found.layers, found.space, cost.name), found.sensitivity.decision_scores, args.points
        )
        for cost in costs
    }
    rows = _write(folder, points, found.layers, unlisted_bytes(model, found.layers))
    lines = [(row.by, row.name, *(find(name).shown(row.costs[name]) for name in (c.name for c in costs)),
              engineering(row.increase), row.summary[:60]) for row in rows]  # fmt: skip
    text = table(("front by", "point", *(cost.unit for cost in costs), "loss", "formats"), lines)
    text += (
        f"\n\nloss: expected increase by the sensitivities, before rounding is calibrated; no accuracy was measured\n"
        f"saved in {folder}: front.csv, front.png, front.html, allocations\n"
        f"next     fliqs-hf quantize {args.model} OUTPUT --allocation {folder}/POINT.json --calibration …"
    )
    answer(args.json, [row._asdict() for row in rows], text)
    return 0


def _write(
    folder: Path, points: dict[Cost, list[FrontPoint]], layers: Sequence[LayerInfo], other_bytes: int
) -> list[FrontRow]:
    """front.csv, front.png and front.html, and an allocation for each point that `quantize --allocation` takes."""
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for cost, found in points.items():
        for number, point in enumerate(found, 1):
            name = f"{cost.name}-{number:02d}"
            point.allocation.save(folder / f"{name}.json")
            known = known_costs(layers, point.allocation)
            known = {
                name: value + other_bytes if value is not None and find(name).of_file else value
                for name, value in known.items()
            }
            rows.append(FrontRow(cost.name, name, known, point.increase, point.allocation.summary()))
    text = io.StringIO()
    writer: Any = csv.writer(text, lineterminator="\n")
    names = list(rows[0].costs)
    writer.writerow(["by", "point", *names, "expected_loss_increase", "formats"])
    for row in rows:
        writer.writerow([row.by, row.name, *(row.costs[name] for name in names), row.increase, row.summary])
    write_text(folder / "front.csv", text.getvalue())
    curves = {
        cost: [(row.costs[cost.name] or 0.0, row.increase, row.name, row.summary) for row in rows if row.by == name]
        for name, cost in ((cost.name, cost) for cost in points)
    }
    write_png(front_figure(curves), folder / "front.png")
    write_text(folder / "front.html", page(curves))
    return rows
