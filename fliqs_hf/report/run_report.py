"""The report of a run: one self-contained HTML page, and PNG figures for the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError
from matplotlib.figure import Figure

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import LayerInfo, bops, registered
from fliqs_hf.cost.models import BOPS
from fliqs_hf.errors import CheckpointError
from fliqs_hf.formats import Format
from fliqs_hf.hf.card import write_card
from fliqs_hf.hf.private import command_line, without_private
from fliqs_hf.hf.provenance import Provenance
from fliqs_hf.hf.results import Result, hardware_of, measured_models, validation_of
from fliqs_hf.hf.templating import environment
from fliqs_hf.hf.validation_record import Validation
from fliqs_hf.json_file import read_object
from fliqs_hf.records import MeasuredAlternatives, PolicyStep, SensitivityScores
from fliqs_hf.report import run_figures as figures
from fliqs_hf.report import run_summary as summary
from fliqs_hf.report.explain import Explanation, explain, read_lines
from fliqs_hf.report.reasons import bounds_of, reasons, rules_of
from fliqs_hf.runs.files import CARD, RUN, RunFiles
from fliqs_hf.runs.finished import FinishedRun

PAGE = f"{RUN}/report.html"
#: Those that are also files, for the card: not that of the policy, which has a panel per decision.
FIGURES = ("allocation", "accuracy_against_cost", "search")
WRITTEN = (PAGE, *(f"{RUN}/figures/{name}.png" for name in FIGURES))


@dataclass(frozen=True)
class Row:
    """One layer; `formats` is None where it stays in fp32, `decisions` empty where it was not searched."""

    name: str
    macs: int
    formats: LayerFormats | None
    decisions: tuple[Explanation, ...]


@dataclass(frozen=True)
class RunReport:
    """What the page shows, all of it read from the run folder.

    Attributes:
        results: the models that were measured, original first.
        formats: those that occur in the allocation, by bits.
        why: decision -> the constraint or trade-off that decided its format, in a sentence.
        signal: what the sensitivity of a layer is measured in; "" where nothing was recorded.
    """

    run: FinishedRun
    name: str
    provenance: Provenance
    validation: Validation | None
    results: list[Result]
    rows: list[Row]
    decisions: list[Explanation]
    formats: list[Format]
    metrics: list[dict[str, Any]]
    policy: list[PolicyStep]
    choices: list[str]
    sensitivity: SensitivityScores | None
    alternatives: MeasuredAlternatives | None
    why: dict[str, str]

    @property
    def signal(self) -> str:
        if self.sensitivity:
            return "expected increase of the loss"
        return "−log-probability in the policy" if self.policy else ""

    @classmethod
    def read(cls, folder: str | Path) -> RunReport:
        """Raises: CheckpointError: no finished run, or records that do not belong together."""
        run = FinishedRun.read(folder)
        if run.records is None or not run.layers:
            raise CheckpointError(
                f"{str(folder)!r} has no layers.json: a report needs the run folder that `fliqs-hf quantize` or "
                "`fliqs-hf search` wrote"
            )
        metrics, policy = read_lines(run.records / "metrics.jsonl"), PolicyStep.history(run.records)
        space, sensitivity = _read(run.records / "search_space.json"), SensitivityScores.read(run.records)
        alternatives = MeasuredAlternatives.read(run.records)
        decisions, why = [], {}
        if space:
            last = policy[-1].probabilities if policy else {}
            scores = {} if sensitivity is None else sensitivity.scores
            measured = None if alternatives is None else alternatives.changes
            decisions = explain(space, run.layers, run.allocation, scores, last, measured)
            signals = scores or {
                name: [-math.log(max(p, 1e-5)) for p in row] for name, row in last.items()
            }  # as `explain` takes them
            said = "predicted loss" if scores else "policy's −log-probability"
            why = reasons(space, run.layers, run.allocation, signals, bounds_of(run, space), rules_of(run), said)
        validation = validation_of(run)
        found = {fmt for pair in run.allocation.values() for fmt in (pair.weight, pair.activation) if fmt}
        return cls(
            run=run,
            name=run.path.resolve().name,
            provenance=Provenance.of(run),
            validation=validation,
            results=measured_models(run, validation),
            rows=[_row(layer, run, decisions) for layer in run.layers],
            decisions=decisions,
            formats=sorted(found, key=lambda fmt: (fmt.bits, not fmt.is_integer)),
            metrics=metrics,
            policy=policy,
            choices=space.get("formats", []),
            sensitivity=sensitivity,
            alternatives=alternatives,
            why=why,
        )


def write_report(folder: str | Path) -> Path:
    """Write `fliqs/report.html` and `fliqs/figures/*.png` into a run folder, and the card anew, which shows them.

    Returns: the path of the page.
    Raises: CheckpointError: see `RunReport.read`. ConfigError: it holds a page, figures or a card that are not ours,
        which stay. DiskError: the folder cannot be written.
    """
    report = RunReport.read(folder)
    files = RunFiles(report.run.path)
    files.check(CARD, *WRITTEN)
    files.claim(PAGE)
    drawn = {
        "allocation": figures.allocation_figure(report),
        "accuracy_against_cost": figures.cost_figure(report),
        "search": figures.curves_figure(report.metrics),
        "policy": figures.policy_figure(report.policy, report.choices),
    }
    page = _page(report, drawn)
    for name in FIGURES:
        _write_figure(files, f"{RUN}/figures/{name}.png", drawn[name])
    files.write(PAGE, page)
    write_card(report.run.path)
    return files.path / PAGE


def _write_figure(files: RunFiles, name: str, figure: Figure | None) -> None:
    """Or remove what an earlier report left, where there is nothing to draw any more."""
    if figure is None:
        files.discard(name)
        return
    files.claim(name)
    figures.write_png(figure, files.path / name)


def _page(report: RunReport, drawn: Mapping[str, Figure | None]) -> str:
    settings = report.run.settings
    told = json.dumps(without_private(settings.told), indent=2, ensure_ascii=False) if settings.told else None
    try:
        return (
            environment("fliqs_hf.report")
            .get_template("run.html.j2")
            .render(
                report=report,
                provenance=report.provenance,
                banner=summary.banner(report),
                tiles=summary.tiles(report),
                measured_on=summary.measured_on(report),
                figures={name: figures.svg(figure, name) for name, figure in drawn.items()},
                colours={fmt.name: (figures.colour(fmt), figures.text_colour(fmt)) for fmt in report.formats},
                command=command_line(settings.command) if settings.command else None,
                settings_json=told,
                prices=_prices(report),
                costs=registered(),
                hardware=hardware_of(report.run),
            )
        )
    except (TypeError, AttributeError, UndefinedError) as error:
        raise CheckpointError(f"a record in {report.run.path} holds a value of another type: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.exists() else {}


def _row(layer: LayerInfo, run: FinishedRun, decisions: Sequence[Explanation]) -> Row:
    own = tuple(decision for decision in decisions if layer.name in decision.layers)
    return Row(layer.name, layer.macs, run.allocation.get(layer.name), own)


def _prices(report: RunReport) -> dict[str, float]:
    """Signal that a step down costs, per 1 % of the model's bit operations that it saves."""
    total = bops(report.run.layers, report.run.allocation)
    return {
        decision.name: 0.01 * total * decision.down.signal / -decision.down.costs[BOPS.name]
        for decision in report.decisions
        if decision.down and decision.down.signal is not None and decision.down.costs[BOPS.name] < 0
    }
