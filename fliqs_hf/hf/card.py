"""The model card of a run: what the model is, what was measured, how it was made. Nothing that was not measured."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from scipy.stats import binomtest

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import bops, weight_bytes
from fliqs_hf.errors import CheckpointError, FormatError
from fliqs_hf.formats import Format, parse
from fliqs_hf.hf.run_folder import RunFolder

CONFIDENCE = 0.95
FP32 = "fp32"
SEARCHED = "searched"
TASK = "image-classification"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy of one model with its two-sided 95 % Wilson interval, and top-5 where measured; fractions."""

    correct: int
    images: int
    low: float
    high: float
    top5: float | None

    @property
    def top1(self) -> float:
        return self.correct / self.images

    @classmethod
    def of(cls, name: str, data: Mapping[str, Any]) -> Accuracy:
        """From `{"top1", "top5", "correct", "n"}`; only top5 may be absent.

        Raises: CheckpointError: counts that are impossible or contradict top1.
        """
        try:
            correct, images, top1 = int(data["correct"]), int(data["n"]), float(data["top1"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"results.json: accuracy of {name!r}: needs top1, correct and n ({error!r})"
            ) from error
        # A stored fraction may be rounded, but never to another count.
        if not 0 <= correct <= images or images == 0 or abs(top1 - correct / images) >= 0.5 / images:
            raise CheckpointError(
                f"results.json: accuracy of {name!r}: top1={top1} contradicts {correct} correct of {images}; "
                "evaluate the model again"
            )
        interval = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
        top5 = data.get("top5")
        return cls(correct, images, float(interval.low), float(interval.high), None if top5 is None else float(top5))


@dataclass(frozen=True)
class Result:
    """One row of the table of results; None where it was not measured, or where no layer shapes were recorded.

    Attributes:
        bops: bit operations per image.
        weight_bytes: packed weights and scales of the Linear and Conv2d layers.
    """

    name: str
    accuracy: Accuracy | None
    bops: int | None
    weight_bytes: int | None

    @property
    def label(self) -> str:
        return {FP32: "original (fp32)", SEARCHED: "this model"}.get(self.name, self.name.replace("_", " "))


def model_card(folder: str | Path, repo_id: str | None = None) -> ModelCard:
    """The card of a run folder, or of a checkpoint folder, from which a shorter card follows.

    Args:
        folder: see `RunFolder`.
        repo_id: where the model is going to be published; names the model and completes the usage snippet, which
            otherwise loads from the folder that the card is in.
    Raises: CheckpointError: an incomplete checkpoint, or records that contradict it.
    """
    run = RunFolder.read(folder)
    results = measured_models(run)
    name = repo_id.rpartition("/")[2] if repo_id else (run.run or run.checkpoint).resolve().name
    data = _metadata(run, results, name)
    template = _environment().get_template("card.md.j2")
    settings = {key: value for key, value in run.settings.items() if key not in ("versions", "command")}
    try:
        body = template.render(
            name=name,
            source=repo_id or ".",
            run=run,
            settings=run.settings,
            settings_json=json.dumps(settings, indent=2, ensure_ascii=False),
            command=_command(run),
            base_model=_base_model(run),
            base_model_id=data.base_model,
            dataset=_dataset(run),
            formats=set(run.allocation.values()),
            results=results,
            searched=results[-1].accuracy,
            target_ratio=(run.results.get("cost") or {}).get("target_ratio"),
            checkpoint_bytes=sum(file.stat().st_size for file in run.weight_files),
            layer_rows=_layer_rows(run),
            image_size=size if isinstance(size := run.model.get("image_size"), int) else 224,
            image_mode="L" if run.model.get("num_channels") == 1 else "RGB",
        )
    except jinja2.UndefinedError as error:
        raise CheckpointError(f"{run.run}: a record lacks a value that the model card needs: {error}") from error
    text = re.sub(r"\n{3,}", "\n\n", body)
    return ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n{text}")


def _metadata(run: RunFolder, results: list[Result], name: str) -> ModelCardData:
    """What the Hub indexes. `base_model` and `datasets` only where they are ids on the Hub."""
    dataset = _dataset(run)
    dataset_id = dataset if dataset and _is_hub_id(dataset) else None
    base_model = _base_model(run)
    base: dict[str, Any] = {}
    if base_model and _is_hub_id(base_model):
        base = {"base_model": base_model, "base_model_relation": "quantized"}
    mixed = len(set(run.allocation.values())) > 1
    accuracy = next((result.accuracy for result in results if result.name == SEARCHED), None)
    evaluation: dict[str, Any] = {}
    if accuracy is not None and dataset is not None:
        where: dict[str, Any] = {
            "task_type": TASK,
            "dataset_type": dataset_id or "custom",
            "dataset_name": Path(dataset).name,
            "dataset_config": run.settings.get("dataset_config_name"),
        }
        measured = [
            EvalResult(**where, metric_type="accuracy", metric_name="Top-1 accuracy", metric_value=accuracy.top1)
        ]
        if accuracy.top5 is not None:
            top5 = EvalResult(
                **where, metric_type="accuracy", metric_name="Top-5 accuracy", metric_value=accuracy.top5
            )
            measured.append(top5)
        evaluation = {"eval_results": measured, "model_name": name, "metrics": ["accuracy"]}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        datasets=[dataset_id] if dataset_id else None,
        tags=["fliqs", "quantized", *(["mixed-precision"] if mixed else [])],
        **base,
        **evaluation,
    )


def measured_models(run: RunFolder) -> list[Result]:
    """Every model of results.json, the original first and this one last, with or without measurements."""
    measured = run.results.get("accuracy") or {}
    others = [name for name in measured if name not in (FP32, SEARCHED)]
    # The cost of the original needs no measurement, but without any result there is nothing to compare.
    names = [*([FP32] if measured or run.layers else []), *others, SEARCHED]
    rows = []
    for name in names:
        accuracy = Accuracy.of(name, measured[name]) if name in measured else None
        allocation = _allocation_of(name, run)
        if not run.layers or allocation is None:
            rows.append(Result(name, accuracy, None, None))
        else:
            rows.append(Result(name, accuracy, bops(run.layers, allocation), weight_bytes(run.layers, allocation)))
    return rows


def _allocation_of(name: str, run: RunFolder) -> Allocation | None:
    """Of a row of the results: empty for the original, and None where its name does not say it."""
    if name == FP32:
        return Allocation({})
    if name == SEARCHED:
        return run.allocation
    if (fmt := _uniform_format(name)) is None:
        return None
    return Allocation.uniform(run.allocation, fmt)


def _uniform_format(name: str) -> Format | None:
    """`uniform_int4` -> INT4."""
    prefix, _, fmt = name.replace("-", "_").replace(" ", "_").partition("_")
    try:
        return parse(fmt) if prefix == "uniform" else None
    except FormatError:
        return None


def _base_model(run: RunFolder) -> str | None:
    return run.settings.get("model_name_or_path")


def _dataset(run: RunFolder) -> str | None:
    """Where the images came from: an id on the Hub, a folder, or the name of a set that a library ships."""
    return run.settings.get("dataset_name") or run.settings.get("train_dir")


def _is_hub_id(name: str) -> bool:
    """Whether `name` is `namespace/name` and no folder of this machine. Names without a namespace are not trusted:
    they are as likely a local name as an old id."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _command(run: RunFolder) -> str | None:
    """As one would type it."""
    command = run.settings.get("command")
    return shlex.join(command) if isinstance(command, list) else command


def _layer_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Layer, MACs (None if not recorded) and formats, in the order of the model; layers left in fp32 included."""
    shapes = {layer.name: layer for layer in run.layers}
    names = [*shapes, *(name for name in run.allocation if name not in shapes)]
    return [
        {"name": name, "macs": shapes[name].macs if name in shapes else None, "formats": run.allocation.get(name)}
        for name in names
    ]


def _percent(fraction: float) -> str:
    return f"{fraction * 100:.2f} %"


def _points(fraction: float) -> str:
    return f"{fraction * 100:.2f}".replace("-", "−")


def _engineering(value: float) -> str:
    """1234567 -> "1.23 M", to be followed by a unit or none."""
    prefix = ""
    for following in "kMGTPE":
        if abs(value) < 999.5:
            break
        value, prefix = value / 1000, following
    return f"{value:.3g} {prefix}"


def _local(name: str) -> str:
    """A path of this machine shown by its last part; anything else unchanged."""
    return name if _is_hub_id(name) else Path(name).name


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fliqs_hf.hf"),
        autoescape=False,  # Markdown
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        percent=_percent,
        points=_points,
        engineering=_engineering,
        local=_local,
        cell=lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    )
    return environment
