"""The report of a run: one self-contained HTML page, and PNG figures for the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost import LayerInfo, bops
from fliqs_hf.errors import CheckpointError
from fliqs_hf.formats import Format
from fliqs_hf.hf.card import Result, measured_models
from fliqs_hf.hf.run_folder import RunFolder
from fliqs_hf.report import run_figures as figures
from fliqs_hf.report.explain import Explanation, explain, read_lines
from fliqs_hf.search.run_files import RunFiles

PAGE = "report.html"
#: Those that are also files, for the card: not that of the policy, which has a panel per decision.
FIGURES = ("allocation", "accuracy_against_cost", "search")


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
        signal: what the sensitivity of a layer is measured in; "" where nothing was recorded.
    """

    run: RunFolder
    name: str
    results: list[Result]
    rows: list[Row]
    decisions: list[Explanation]
    formats: list[Format]
    metrics: list[dict[str, Any]]
    policy: list[dict[str, Any]]
    choices: list[str]
    sensitivity: dict[str, Any]

    @property
    def signal(self) -> str:
        if self.sensitivity:
            return "expected increase of the loss"
        return "−log-probability in the policy" if self.policy else ""

    @classmethod
    def read(cls, folder: str | Path) -> RunReport:
        """Raises: CheckpointError: no finished run, or records that do not belong together."""
        run = RunFolder.read(folder)
        if run.run is None or not run.layers:
            raise CheckpointError(
                f"{str(folder)!r} has no layers.json: a report needs the run folder of a search "
                "(the output_dir of recipes/vit.py or `fliqs-hf search`)"
            )
        metrics, policy = (read_lines(run.run / name) for name in ("metrics.jsonl", "policy.jsonl"))
        space, sensitivity = (_read(run.run / name) for name in ("search_space.json", "sensitivity.json"))
        decisions = []
        if space:
            last = policy[-1]["probabilities"] if policy else {}
            decisions = explain(space, run.layers, run.allocation, sensitivity.get("scores", {}), last)
        found = {fmt for pair in run.allocation.values() for fmt in (pair.weight, pair.activation) if fmt}
        return cls(
            run=run,
            name=run.run.resolve().name,
            results=measured_models(run),
            rows=[_row(layer, run, decisions) for layer in run.layers],
            decisions=decisions,
            formats=sorted(found, key=lambda fmt: (fmt.bits, not fmt.is_integer)),
            metrics=metrics,
            policy=policy,
            choices=space.get("formats", []),
            sensitivity=sensitivity,
        )


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder.

    Returns: the path of the page.
    Raises: CheckpointError: see `RunReport.read`. ConfigError: it holds a page or figures that are not ours, which
        stay. DiskError: the folder cannot be written.
    """
    report = RunReport.read(folder)
    assert report.run.run is not None
    files = RunFiles(report.run.run)
    files.claim(PAGE)
    files.check(*(f"figures/{name}.png" for name in FIGURES))
    drawn = {
        "allocation": figures.allocation_figure(report),
        "accuracy_against_cost": figures.cost_figure(report),
        "search": figures.curves_figure(report.metrics),
        "policy": figures.policy_figure(report.policy, report.choices),
    }
    page = (
        _environment()
        .get_template("run.html.j2")
        .render(
            report=report,
            figures={name: figures.svg(figure, name) for name, figure in drawn.items()},
            colours={fmt.name: (figures.colour(fmt), figures.text_colour(fmt)) for fmt in report.formats},
            settings_json=json.dumps(_shown_settings(report), indent=2, ensure_ascii=False),
            prices=_prices(report),
            **_summary(report),
        )
    )
    for name in FIGURES:
        _write_figure(files, f"figures/{name}.png", drawn[name])
    files.write(PAGE, page)
    return report.run.run / PAGE


def _write_figure(files: RunFiles, name: str, figure: Figure | None) -> None:
    """Or remove what an earlier report left, where there is nothing to draw any more."""
    if figure is None:
        files.discard(name)
        return
    files.claim(name)
    figures.write_png(figure, files.path / name)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not an object")
    return data


def _row(layer: LayerInfo, run: RunFolder, decisions: Sequence[Explanation]) -> Row:
    own = tuple(decision for decision in decisions if layer.name in decision.layers)
    return Row(layer.name, layer.macs, run.allocation.get(layer.name), own)


def _summary(report: RunReport) -> dict[str, Any]:
    """The figures at the top; None where they were not measured."""
    by_name = {result.name: result for result in report.results}
    fp32, searched = by_name.get("fp32"), by_name.get("searched")
    cost = report.run.results.get("cost") or {}
    return {
        "fp32": fp32.accuracy if fp32 else None,
        "searched": searched.accuracy if searched else None,
        "bops": searched.bops if searched else None,
        "fp32_bops": fp32.bops if fp32 else None,
        "checkpoint_bytes": sum(file.stat().st_size for file in report.run.weight_files),
        "fp32_bytes": report.run.results.get("fp32_bytes"),
        "target_ratio": cost.get("target_ratio"),
        "target": report.run.results.get("target") or {},
    }


def _prices(report: RunReport) -> dict[str, float]:
    """Signal that a step down costs, per 1 % of the model's bit operations that it saves."""
    total = bops(report.run.layers, report.run.allocation)
    return {
        decision.name: 0.01 * total * decision.down.signal / -decision.down.bops
        for decision in report.decisions
        if decision.down and decision.down.signal is not None and decision.down.bops < 0
    }


def _shown_settings(report: RunReport) -> dict[str, Any]:
    return {key: value for key, value in report.run.settings.items() if key not in ("versions", "command")}


def _engineering(value: float) -> str:
    """1234567 -> "1.23 M"."""
    prefix = ""
    for following in "kMGTPE":
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, following
    return f"{value:.3g} {prefix}".strip().replace("-", "−")


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + _engineering(value)


def _thousandths(value: float) -> str:
    """0.0123 -> "12.3"."""
    value = 1000 * value
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else "0" if value == 0 else f"{value:.0e}"


def _signal(value: float) -> str:
    return ("+" if value >= 0 else "") + _thousandths(value).replace("-", "−", 1)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fliqs_hf.report"),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=lambda fraction: f"{fraction * 100:.2f} %",
        points=lambda fraction: f"{round(fraction * 100, 2) + 0.0:+.2f}".replace("-", "−"),
        engineering=_engineering,
        signed=_signed,
        signal=_signal,
        thousandths=_thousandths,
    )
    return environment
