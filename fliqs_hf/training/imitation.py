"""Imitating a teacher: its predictions, and what its blocks put out on the way there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.select import blocks_of, quantizable_layers
from fliqs_hf.tasks import Task


class Teacher:
    """A frozen model, and what a student of the same architecture loses by not being like it. A context, which ends
    the watching of the student.

    Two terms: `Task.imitation` of the predictions (Hinton et al. 2015), and the squared difference of the outputs of
    blocks over the teacher's own squared output, mean over blocks (as hints of FitNets, Romero et al. 2015, between
    layers of one size, without a regressor). Blocks are the innermost numbered modules that hold several layers, such
    as those of a transformer; a model without any is compared layer by layer.
    """

    def __init__(self, model: nn.Module, task: Task, device: torch.device, student: nn.Module | None = None) -> None:
        """
        Args:
            model: is moved to the device and frozen.
            student: whose blocks are compared with its own.
        """
        self.model, self.task = model.to(device).eval().requires_grad_(False), task
        names = [] if student is None else list(quantizable_layers(model))
        blocks = [block for block in dict.fromkeys(blocks_of(names)) if block not in names]
        self._own = _Outputs(model, blocks or names)
        self._student = _Outputs(model if student is None else student, blocks or names)

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *_: object) -> None:
        for outputs in (self._own, self._student):
            outputs.close()

    @torch.no_grad()
    def prediction(self, images: Tensor) -> Tensor:
        """Its own, float32; what its blocks put out is kept for `watching`."""
        with self._own.collecting():
            return self.task.prediction(self.model(images)).float()

    @contextmanager
    def watching(self) -> Iterator[Callable[[], Tensor]]:
        """Around a forward pass of the student over the same images.

        Yields: what gives, after that pass, the mean over blocks of ‖student − teacher‖² / ‖teacher‖², [], float32.
        """
        with self._student.collecting():
            yield self._missed

    def _missed(self) -> Tensor:
        found, wanted = self._student.values, self._own.values
        if len(found) != len(wanted):
            raise ConfigError(
                f"the student's blocks were run {len(found)} times, the teacher's {len(wanted)} times: outputs of "
                "blocks can be imitated where both are of one architecture; set distill_features=0"
            )
        parts = []
        for student, teacher in zip(found, wanted, strict=True):
            norm = teacher.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
            parts.append(nn.functional.mse_loss(student.float(), teacher.float()) / norm)
        return torch.stack(parts).mean()


class _Outputs:
    """What modules put out in a forward pass, in its order. The hooks stay, as what is compiled would be compiled
    again with others; they collect on request only: a checkpointed block runs again in the backward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.values: list[Tensor] = []
        self.active = False
        self._handles = [model.get_submodule(name).register_forward_hook(self._keep) for name in names]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        self.values.clear()
        self.active = True
        try:
            yield
        finally:
            self.active = False

    def _keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.active:
            self.values.append(_first_tensor(output))


def _first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first_tensor(output[0])  # of a tuple, or a `ModelOutput`
