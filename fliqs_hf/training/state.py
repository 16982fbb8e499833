"""Training states on disk: safetensors and JSON, nothing pickled, written beside and then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fliqs_hf.errors import CheckpointError, TrainingError

_NAME = "step-{:08d}"


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
    Raises: TrainingError: the disk is full or not writable; the last complete state is untouched.
    """
    final = folder / _NAME.format(step)
    draft = folder / f".{final.name}.tmp"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        for file, tensors in (("model", weights), ("optimizer", optimizer), ("extra", extra)):
            whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
            save_file(whole, draft / f"{file}.safetensors")
        (draft / "meta.json").write_text(json.dumps({**meta, "step": step}, indent=2))
        shutil.rmtree(final, ignore_errors=True)  # of an earlier run in the same folder
        os.replace(draft, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise TrainingError(f"cannot write the training state {final}: {error}; free some space and resume") from error
    for old in states(folder):
        if old != final:
            shutil.rmtree(old)


def states(folder: Path) -> list[Path]:
    """Complete states, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "meta.json").is_file())


def load_state(
    path: Path, load: Callable[[dict[str, Tensor], dict[str, Tensor]], None], meta: dict[str, Any]
) -> tuple[int, dict[str, Tensor]]:
    """Restore in place.

    Args:
        load: takes weights and optimizer states, on the CPU.
    Returns: steps done, and the extra tensors.
    Raises: CheckpointError: unreadable, or written with other settings (it names the first that differs).
    """
    try:
        stored = json.loads((path / "meta.json").read_text())
        for key, value in meta.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"{path} was written with {key}={stored.get(key)!r}, this run has {value!r}; "
                    "resume with the same settings, or start in a new output_dir"
                )
        load(load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors"))
        return int(stored["step"]), load_file(path / "extra.safetensors")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the training state {path} cannot be read: {error}; delete it to start again"
        ) from error


class Best:
    """The best weights so far, in one file: tensors, and the score and step in its header."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "model.safetensors"

    def offer(self, score: float, step: int, model: nn.Module) -> None:
        """Keep the weights if the score is the best so far.

        Raises: TrainingError: the disk is full or not writable; the best weights so far are untouched.
        """
        if self.file.exists() and score <= self.score():
            return
        draft = self.file.with_suffix(".tmp")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, draft, metadata={"best": json.dumps({"score": score, "step": step})})
            os.replace(draft, self.file)
        except (OSError, SafetensorError) as error:
            draft.unlink(missing_ok=True)
            raise TrainingError(f"cannot write {self.file}: {error}; free some space and resume") from error

    def score(self) -> float:
        with safe_open(self.file, framework="pt") as file:
            return float(json.loads(file.metadata()["best"])["score"])

    def load(self, model: nn.Module) -> None:
        """Give the model the best weights, if any were kept."""
        if self.file.exists():
            model.load_state_dict(load_file(self.file))

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)
