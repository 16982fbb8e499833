"""Training states on disk: safetensors and JSON, nothing pickled, complete or not there, verified before use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fliqs_hf import checksums
from fliqs_hf.errors import CheckpointError
from fliqs_hf.files import disk_errors, remove, replacing
from fliqs_hf.json_file import parse_json, read_object

_NAME = "step-{:08d}"
_FILES = ("model", "optimizer", "extra")


def save_state(
    folder: Path,
    step: int,
    weights: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    extra: dict[str, Tensor],
    meta: dict[str, Any],
) -> None:
    """Write the state after `step` steps as `folder/step-…`, then drop older ones.

    Args:
        weights, optimizer: see `Backend.tensors`.
        meta: the settings that a run must have to go on from here, and what else is known at this step; as JSON.
    Raises: DiskError: the last complete state is untouched.
    """
    final = folder / _NAME.format(step)
    with replacing(final) as draft:
        draft.mkdir()
        for file, tensors in zip(_FILES, (weights, optimizer, extra), strict=True):
            whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(whole, draft / f"{file}.safetensors")
        (draft / "meta.json").write_text(json.dumps({**meta, "step": step}, indent=2), encoding="utf-8")
        checksums.seal_folder(draft)
    for old in states(folder):
        if old != final:
            with disk_errors(old):
                remove(old)


def states(folder: Path) -> list[Path]:
    """Written states, oldest first. Nothing but damage makes one incomplete: it gets its name when it is whole."""
    return sorted(folder.glob("step-*"))


def steps_done(folder: Path) -> int:
    """Of the state that `load_state` would read; 0 without one. Raises: CheckpointError: no state has such a name."""
    saved = states(folder)
    return _step_of(saved[-1]) if saved else 0


def load_state(
    path: Path, load: Callable[[dict[str, Tensor], dict[str, Tensor]], None], meta: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore in place.

    Args:
        load: takes weights and optimizer states, on the CPU.
        meta: the settings of this run.
    Returns: the meta data that the state was saved with and its "step", and the extra tensors.
    Raises: CheckpointError: damaged in any file, of another step than it is named after, or written with other
        settings (it names the first that differs). Nothing is loaded then.
    """
    try:
        checksums.check_folder(path)
        stored = read_object(path / "meta.json")
        if stored["step"] != _step_of(path):
            raise CheckpointError(f"{path} is the state of step {stored['step']}")
        tensors = {file: load_file(path / f"{file}.safetensors") for file in _FILES}
    except (CheckpointError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the training state {path} cannot be read: {error}; remove that folder, and --resume trains again from "
            "the beginning"
        ) from error
    for key, value in meta.items():
        if stored.get(key) != value:
            raise CheckpointError(
                f"{path} was written with {key}={stored.get(key)!r}, this run has {value!r}; "
                "resume with the same settings, or start in a new output_dir"
            )
    try:
        load(tensors["model"], tensors["optimizer"])
    except (KeyError, ValueError, RuntimeError) as error:  # intact, and yet of another model
        raise CheckpointError(
            f"the training state {path} is not of this model: {error}; start in a new output_dir"
        ) from error
    return stored, tensors["extra"]


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("step-")
    if path.name != _NAME.format(int(number) if number.isascii() and number.isdigit() else 0):
        raise CheckpointError(f"{path} does not have the name of a state; remove it, or give it its name back")
    return int(number)


class Best:
    """The best weights so far, in one file: tensors, and their score, step and checksum in its header.

    Attributes:
        record: score and step of what is kept, of which a training state takes note; None where nothing is.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.safetensors"
        self.record: dict[str, Any] | None = None
        self._remedy = f"remove the folder {folder.parent}, and --resume trains again from the beginning"

    def offer(self, score: float, step: int, model: nn.Module) -> None:
        """Keep the weights if the score is the best so far. Raises: DiskError: the best so far is untouched."""
        if self.record is not None and score <= self.record["score"]:
            return
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        record = {"score": score, "step": step}
        header = checksums.sealed({**record, "weights": checksums.of_tensors(tensors)})
        with replacing(self.file) as draft:
            save_file(tensors, draft, metadata={"best": json.dumps(header)})
        self.record = record

    def resume(self, noted: dict[str, Any] | None) -> None:
        """Go on from a training state.

        Args:
            noted: `record` when the state was saved. The file may be of a step after that, which will come again.
        Raises: CheckpointError: the file is damaged, lost, or an older one.
        """
        if noted is None:
            return
        self.record = self._read()[0]
        if self.record["score"] < noted["score"]:
            raise CheckpointError(
                f"{self.file} holds the weights of step {self.record['step']}, the training state knows better ones, "
                f"of step {noted['step']}; {self._remedy}"
            )

    def load(self, model: nn.Module) -> None:
        """Give the model the best weights. Raises: CheckpointError: they are damaged or lost."""
        model.load_state_dict(self._read()[1])

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            with safe_open(self.file, framework="pt") as file:
                header = checksums.unsealed(parse_json((file.metadata() or {}).get("best", "null"), "its header"))
            tensors = load_file(self.file)
            if header.pop("weights") != checksums.of_tensors(tensors):
                raise ValueError("its weights are not what was written")
        except (CheckpointError, OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(f"the best weights {self.file} cannot be read: {error}; {self._remedy}") from error
        return header, tensors
