"""`fliqs-hf front`."""

from __future__ import annotations

import argparse
import copy
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fliqs_hf.baselines.front import FrontPoint, sensitivity_front
from fliqs_hf.cli.calibration import CalibrationImages, pack, rounded, turn
from fliqs_hf.cli.held_out import HeldOutImages
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.targets import settle
from fliqs_hf.cli.unused import check_unused
from fliqs_hf.cost import LayerInfo, unlisted_bytes
from fliqs_hf.cost.latency import LatencyTable, use
from fliqs_hf.cost.models import Cost, find, known_costs
from fliqs_hf.errors import ConfigError
from fliqs_hf.files import replacing, write_text
from fliqs_hf.pipeline.checkpoints import load_model, load_processor, read_config, traced
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.pipeline.outputs import check_apart, check_writable, data_source
from fliqs_hf.pipeline.post_training import allocate
from fliqs_hf.report.front_page import Point, front_figure, page
from fliqs_hf.report.run_figures import write_png
from fliqs_hf.training.loading import device_of
from fliqs_hf.validation.statistics import proportion
from fliqs_hf.wording import percent

#: Of the intervals of what is measured.
CONFIDENCE = 0.95


class FrontRow(NamedTuple):
    """A point of the front by one cost."""

    by: str
    name: str
    costs: dict[str, float | None]
    increase: float
    summary: str
    measured: dict[str, float] | None = None


def front(args: argparse.Namespace) -> int:
    """Raises: ConfigError: a folder with something in it, an unknown cost, a model that cannot be searched."""
    if not args.measure:
        of_measuring = ("held_out", "held_out_split", "held_out_images")
        check_unused(args, "is for measuring: give --measure POINTS", *of_measuring)
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
    held_out = HeldOutImages(args, model, processor, images) if args.measure else None
    turn(args, model, images, chosen=True)
    found = allocate(
        model,
        images.labelled,
        costs[0].name,
        search_space=args.search_space,
        activation=args.activation,
        **rounded(args),
        task=images.task,
    )
    points = {
        cost: sensitivity_front(
            search_problem(model, found.layers, found.space, cost.name), found.sensitivity.decision_scores, args.points
        )
        for cost in costs
    }
    measured = {} if held_out is None else _measured(args, model, images, held_out, list(points.values()))
    with replacing(folder) as draft:
        draft.mkdir()
        rows = _write(draft, points, found.layers, unlisted_bytes(model, found.layers), measured)
    lines = [(row.by, row.name, *(find(name).shown(row.costs[name]) for name in (c.name for c in costs)),
              f"{row.increase:.3g}", "–" if row.measured is None else percent(row.measured["accuracy"]),
              row.summary[:60]) for row in rows]  # fmt: skip
    text = table(("front by", "point", *(cost.unit for cost in costs), "loss", "top-1", "formats"), lines)
    text += (
        f"\n\nloss: expected increase by the sensitivities, before rounding is calibrated; top-1: "
        f"{'not measured (--measure 5)' if held_out is None else f'of packed models on {len(held_out)} images'}\n"
        f"saved in {folder}: front.csv, front.png, front.html, allocations\n"
        f"next     fliqs-hf quantize {args.model} OUTPUT --allocation {folder}/POINT.json --calibration …"
    )
    answer(args.json, [row._asdict() for row in rows], text)
    return 0


def _measured(
    args: argparse.Namespace,
    model: Any,
    images: CalibrationImages,
    held_out: HeldOutImages,
    fronts: Sequence[Sequence[FrontPoint]],
) -> dict[tuple[Any, ...], dict[str, float]]:
    """Right answers of packed models with their 95 % interval: of `--measure` points of each front, ends included,
    evenly spaced along it; by what an allocation says, as several fronts share some."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for points in fronts:
        count = min(args.measure, len(points))
        chosen = [round(i * (len(points) - 1) / max(count - 1, 1)) for i in range(count)]
        for allocation in (points[index].allocation for index in chosen):
            key = tuple(allocation.items())
            if key in found:
                continue
            right = held_out.right(pack(args, copy.deepcopy(model), allocation, images), "held-out images")
            share = proportion(int(right.sum()), len(right), CONFIDENCE)
            found[key] = {
                "accuracy": share.value, "low": share.low, "high": share.high, "images": float(len(right))
            }  # fmt: skip
    return found


def _write(
    folder: Path,
    points: dict[Cost, list[FrontPoint]],
    layers: Sequence[LayerInfo],
    other_bytes: int,
    measured: Mapping[tuple[Any, ...], dict[str, float]],
) -> list[FrontRow]:
    """front.csv, front.png and front.html, and an allocation for each point that `quantize --allocation` takes."""
    shown: dict[Cost, list[Point]] = {cost: [] for cost in points}
    rows = []
    for cost, found in points.items():
        for number, point in enumerate(found, 1):
            name = f"{cost.name}-{number:02d}"
            point.allocation.save(folder / f"{name}.json")
            known = known_costs(layers, point.allocation)
            known = {
                name: value + other_bytes if value is not None and find(name).of_file else value
                for name, value in known.items()
            }
            own = measured.get(tuple(point.allocation.items()))
            rows.append(FrontRow(cost.name, name, known, point.increase, point.allocation.summary(), own))
            shown[cost].append(
                Point(known[cost.name] or 0.0, point.increase, name, point.allocation, None if own is None else
                      (own["accuracy"], own["low"], own["high"]))
            )  # fmt: skip
    text = io.StringIO()
    writer: Any = csv.writer(text, lineterminator="\n")
    names = list(rows[0].costs)
    more = ("accuracy", "low", "high", "images") if measured else ()
    writer.writerow(["by", "point", *names, "expected_loss_increase", *more, "formats"])
    for row in rows:
        values = [(row.measured or {}).get(name) for name in more]
        writer.writerow([row.by, row.name, *(row.costs[name] for name in names), row.increase, *values, row.summary])
    write_text(folder / "front.csv", text.getvalue())
    write_png(front_figure(shown), folder / "front.png")
    write_text(folder / "front.html", page(shown))
    return rows
