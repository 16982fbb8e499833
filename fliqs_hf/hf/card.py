"""The model card of a run: what the model is, what was measured, how it was made. Nothing that was not measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from fliqs_hf.cost import registered
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.hf.private import command_line, is_hub_id, last_part, without_private
from fliqs_hf.hf.provenance import Provenance
from fliqs_hf.hf.results import SEARCHED, Result, hardware_of, measured_models, validation_of
from fliqs_hf.hf.templating import Markdown, markdown
from fliqs_hf.runs.files import CARD, RunFiles
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task, find_task

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,60}")
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s", re.DOTALL)
#: Of a README, to look for its licence in.
_MOST_CHARACTERS = 100_000


def model_card(
    folder: str | Path, repo_id: str | None = None, *, base_model: str | None = None, license: str | None = None
) -> ModelCard:
    """The card of a run folder, or of a model alone, from which a shorter card follows.

    Args:
        folder: see `FinishedRun`.
        repo_id: where the model is going to be published; names the model and completes the usage snippet, which
            otherwise loads from the folder that the card is in.
        base_model: id on the Hub of what was quantized. Default: the run's model_name_or_path where that is an id.
        license: as the Hub names it ("apache-2.0"). Default: what the README of a local original says, else none.
    Raises:
        CheckpointError: an incomplete checkpoint, or records that contradict it.
        ConfigError: a repository, base model or licence that cannot be one.
    """
    check_names(repo_id, base_model, license)
    run = FinishedRun.read(folder)
    validation = validation_of(run)
    results = measured_models(run, validation)
    measured = run.results.accuracy
    dataset = _dataset(run) if SEARCHED in measured or validation is None else validation.dataset
    name = repo_id.rpartition("/")[2] if repo_id else run.path.resolve().name
    data = _metadata(run, results, name, dataset, base_model, license)
    settings, command = run.settings, run.settings.command
    values = {
        "name": name,
        "source": repo_id or ".",
        "run": run,
        "provenance": Provenance.of(run),
        "settings": settings.arguments,
        "versions": settings.versions,
        "settings_json": json.dumps(without_private(settings.told), indent=2, ensure_ascii=False),
        "command": command_line(command) if command else None,
        "base_model": last_part(source) if (source := _source(run)) else None,
        "base_model_id": data.base_model,
        "dataset": last_part(dataset) if dataset else None,
        "formats": set(run.allocation.values()),
        "results": results,
        "costs": registered(),
        "searched": results[-1].accuracy,
        "validation": validation,
        "validated_on": last_part(validation.dataset) if validation and validation.dataset else None,
        "target_ratio": run.results.cost.get("target_ratio"),
        "hardware": hardware_of(run),
        "checkpoint_bytes": sum(file.stat().st_size for file in run.weight_files),
        "layer_rows": _layer_rows(run),
        "image_size": size if isinstance(size := run.model.get("image_size"), int) else 224,
        "task": task_of(run),
        "example": Markdown(task_of(run).example),  # a line of our own code
        "image_mode": "L" if run.model.get("num_channels") == 1 else "RGB",
    }
    try:
        body = markdown("fliqs_hf.hf", "card.md.j2", values)
    except (jinja2.UndefinedError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{run.path}: a record lacks a value that the model card needs: {error}") from error
    text = re.sub(r"\n{3,}", "\n\n", body)
    return ModelCard(f"---\n{data.to_yaml().strip()}\n---\n\n{text}")


def task_of(run: FinishedRun) -> Task:
    """Of the run's model. Raises: ConfigError: none that is registered."""
    return find_task(run.settings.arguments.get("task") or IMAGE_CLASSIFICATION.name)


def write_card(folder: str | Path) -> Path:
    """Write the card of a run folder into it, as `README.md`.

    Raises: as `model_card`. ConfigError: there is one that is not ours. DiskError: the folder cannot be written.
    """
    files = RunFiles(Path(folder))
    files.write(CARD, str(model_card(folder)))
    return files.path / CARD


def check_names(repo_id: str | None, base_model: str | None, license: str | None) -> None:
    """Raises: ConfigError: one that the Hub could not know."""
    for argument, value in (("repo_id", repo_id), ("base_model", base_model)):
        if value is not None:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                raise ConfigError(
                    f"{argument}={value!r} is no name on the Hub, such as facebook/deit-tiny-patch16-224 ({error})"
                ) from error
    if license is not None and not _LICENSE.fullmatch(license):
        raise ConfigError(
            f"license={license!r} is no identifier of a licence on the Hub; they look like apache-2.0, mit, cc-by-4.0"
        )


def _metadata(
    run: FinishedRun,
    results: list[Result],
    name: str,
    dataset: str | None,
    base_model: str | None,
    license: str | None,
) -> ModelCardData:
    """What the Hub indexes. `base_model` and `datasets` only where they are ids on the Hub.

    Args: dataset: that the accuracies were measured on.
    """
    task = task_of(run).name
    used = _dataset(run)
    used_id = used if used and is_hub_id(used) else None
    source = _source(run)
    if base_model is None and source and is_hub_id(source):
        base_model = source
    base: dict[str, Any] = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    if license := license or _license_of(source):
        base["license"] = license
    mixed = len(set(run.allocation.values())) > 1
    accuracy = next((result.accuracy for result in results if result.name == SEARCHED), None)
    evaluation: dict[str, Any] = {}
    if accuracy is not None and dataset is not None:
        where: dict[str, Any] = {
            "task_type": task,
            "dataset_type": dataset if is_hub_id(dataset) else "custom",
            "dataset_name": last_part(dataset).rpartition("/")[2],
            "dataset_config": run.settings.arguments.get("dataset_config_name") if dataset == used else None,
        }
        top1 = accuracy.measure == "top-1"
        words = ("accuracy", "Top-1 accuracy") if top1 else (accuracy.key, accuracy.measure)
        kind, title = words
        measured = [EvalResult(**where, metric_type=kind, metric_name=title, metric_value=accuracy.value)]
        if accuracy.top5 is not None:
            top5 = EvalResult(
                **where, metric_type="accuracy", metric_name="Top-5 accuracy", metric_value=accuracy.top5
            )
            measured.append(top5)
        evaluation = {"eval_results": measured, "model_name": name, "metrics": [kind]}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        datasets=[used_id] if used_id else None,
        tags=["fliqs", "quantized", *(["mixed-precision"] if mixed else [])],
        **base,
        **evaluation,
    )


def _source(run: FinishedRun) -> str | None:
    """What was quantized: an id on the Hub, or a folder."""
    source = run.settings.arguments.get("model_name_or_path")
    return source if isinstance(source, str) and source else None


def _license_of(source: str | None) -> str | None:
    """What the README of a local original says; a licence is a statement of its owner, so nothing is guessed."""
    readme = Path(source) / "README.md" if source else None
    if readme is None or not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as file:
        matter = _FRONT_MATTER.match(file.read(_MOST_CHARACTERS))
    try:
        data = yaml.safe_load(matter[1]) if matter else None
    except (yaml.YAMLError, RecursionError):
        return None  # of a README that the Hub would refuse as well
    stated = data.get("license") if isinstance(data, dict) else None
    return stated if isinstance(stated, str) and _LICENSE.fullmatch(stated) else None


def _dataset(run: FinishedRun) -> str | None:
    """Where the images came from: an id on the Hub, a folder, or the name of a set that a library ships."""
    settings = run.settings.arguments
    dataset = settings.get("dataset_name") or settings.get("train_dir")
    return dataset if isinstance(dataset, str) else None


def _layer_rows(run: FinishedRun) -> list[dict[str, Any]]:
    """Layer, MACs (None if not recorded) and formats, in the order of the model; layers left in fp32 included."""
    shapes = {layer.name: layer for layer in run.layers}
    names = [*shapes, *(name for name in run.allocation if name not in shapes)]
    return [
        {"name": name, "macs": shapes[name].macs if name in shapes else None, "formats": run.allocation.get(name)}
        for name in names
    ]
