"""Reading a finished run: its checkpoint, checked to be complete, and what was recorded beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.hf.checkpoint import plain_name, read_header
from fliqs_hf.hf.config import METHOD, FLIQSConfig
from fliqs_hf.json_file import read_json, read_object
from fliqs_hf.records import RunResults, RunSettings
from fliqs_hf.runs.files import RUN, is_earlier_run, is_run

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class FinishedRun:
    """A run folder, or only a packed model. What was not recorded is None or empty, never assumed.

    Attributes:
        path: folder with config.json, packed weights and image processor.
        records: its folder `fliqs`; None where there is only a model.
        model: its config.json.
        quantization: the quantization_config in there, validated; the allocation in it is the model's.
        weight_files: all of them complete.
        settings, results, validation: records of that name; without one there is nothing in them.
        layers: those of layers.json.
        figures: PNG files, by name.
    """

    path: Path
    records: Path | None
    model: dict[str, Any]
    quantization: FLIQSConfig
    weight_files: tuple[Path, ...]
    settings: RunSettings
    results: RunResults
    validation: dict[str, Any]
    layers: tuple[LayerInfo, ...]
    figures: tuple[Path, ...]

    @property
    def allocation(self) -> Allocation:
        allocation: Allocation = self.quantization.allocation
        return allocation

    def has(self, record: str) -> bool:
        """Whether there is a record of that name, such as "metrics.jsonl"."""
        return self.records is not None and (self.records / record).exists()

    @classmethod
    def read(cls, folder: str | Path) -> FinishedRun:
        """Read `folder`, and check that its model is packed, complete and of the allocation that is on record.

        Raises: CheckpointError: it is not; the message names the file and the remedy.
        """
        folder = Path(folder)
        records = folder / RUN if (folder / RUN).is_dir() else None
        if not (folder / "config.json").is_file() or is_earlier_run(folder):
            raise CheckpointError(_no_model(folder))
        model = read_object(folder / "config.json")
        quantization = _quantization(folder / "config.json", model)
        if not any((folder / name).is_file() for name in PROCESSORS):
            raise CheckpointError(
                f"{folder} has no {PROCESSORS[0]}: nobody could prepare images for this model; "
                "save the image processor there with `image_processor.save_pretrained`"
            )
        validation = records / "validation.json" if records else None
        beside = records / "allocation.json" if records else None
        if beside and beside.exists() and Allocation.load(beside) != quantization.allocation:
            raise CheckpointError(
                f"{beside} is not the allocation that the model is packed by; remove the one that is out of date"
            )
        return cls(
            path=folder,
            records=records,
            model=model,
            quantization=quantization,
            weight_files=_weight_files(folder, quantization.allocation),
            layers=_layers(records / "layers.json") if records and (records / "layers.json").exists() else (),
            figures=tuple(sorted((records / "figures").glob("*.png"))) if records else (),
            settings=(records and RunSettings.read(records)) or RunSettings(),
            results=(records and RunResults.read(records)) or RunResults(),
            validation=read_object(validation) if validation and validation.exists() else {},
        )


def _no_model(folder: Path) -> str:
    """Why there is no model at the top of a folder, and what to do."""
    if is_earlier_run(folder):
        return (
            f"{folder} is a run folder of an earlier version of fliqs_hf, which kept the model in checkpoint/: give "
            f"{folder / 'checkpoint'} instead, which is a model like any other; its records are not read any more"
        )
    if targets := sorted(str(config.parent) for config in folder.glob("*-*/config.json")):
        return f"{folder} holds a run for each of several targets: give one of them, such as {targets[0]}"
    if (folder / RUN / "results.json").is_file():
        return f"{folder} has lost the config.json of its model: restore it, or make the model again"
    if is_run(folder):
        return f"the run in {folder} is not finished, there is no model yet: go on with it by `search --resume`"
    return f"{str(folder)!r} is neither a run folder nor that of a model: it has no config.json"


def _quantization(path: Path, model: dict[str, Any]) -> FLIQSConfig:
    data = model.get("quantization_config")
    if not isinstance(data, dict) or data.get("quant_method") != METHOD:
        raise CheckpointError(f"{path}: this model is not quantized by fliqs_hf; quantize it first")
    config: FLIQSConfig = FLIQSConfig.from_dict(data)
    if config.allocation is None:
        raise CheckpointError(f"{path}: this model is still being searched; pack it with `fliqs_hf.quantize` first")
    return config


def _layers(path: Path) -> tuple[LayerInfo, ...]:
    try:
        return tuple(LayerInfo(**entry) for entry in read_json(path))
    except (ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file name. Raises: CheckpointError: an entry that is not the plain name of a file beside the index."""
    indexed = read_object(path).get("weight_map")
    if not isinstance(indexed, dict) or not indexed:
        raise CheckpointError(f"{path} has no weight_map; save the model there again")
    for name, file in indexed.items():
        if not isinstance(file, str) or not plain_name(file):
            raise CheckpointError(f"{path} says that {name!r:.100} is in {file!r:.100}: that is no file beside it")
    return indexed


def _weight_files(checkpoint: Path, allocation: Allocation) -> tuple[Path, ...]:
    """The weight files that `from_pretrained` would read, after checking that they hold every packed weight."""
    if (checkpoint / WEIGHTS).is_file():
        files: tuple[Path, ...] = (checkpoint / WEIGHTS,)
        indexed: dict[str, str] = {}
    elif (checkpoint / INDEX).is_file():
        indexed = _weight_map(checkpoint / INDEX)
        files = tuple(checkpoint / name for name in sorted(set(indexed.values())))
    else:
        raise CheckpointError(f"{checkpoint} has no {WEIGHTS} and no {INDEX}; save the model there again")
    if lost := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{checkpoint / INDEX} points at {lost[0]}, which is missing; save the model again")
    headers = {file.name: read_header(str(file)) for file in files}
    if lost := [name for name, file in indexed.items() if name not in headers[file]]:
        raise CheckpointError(f"{checkpoint / INDEX} says that {lost[0]!r} is in {indexed[lost[0]]}, but it is not")
    types = {name: kind for header in headers.values() for name, (_, kind) in header.items()}
    for name in allocation:
        if types.get(f"{name}.weight") != "U8":
            raise CheckpointError(
                f"{checkpoint}: config.json says that {name!r} is packed in {allocation[name].weight}, but the weight "
                f"files hold {types.get(f'{name}.weight', 'nothing')} for it; save the model again"
            )
    return files
