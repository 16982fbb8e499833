"""A model and its optimizer whole on every process: one process, or DDP. Other backends differ from this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.compiling import compiled


class Backend:
    """A model and an optimizer that accelerate has prepared.

    Attributes:
        model, optimizer: the prepared ones.
        given: the model as it was handed in, whose weights these are.
        task: what its output is.
        compiles: whether its passes are compiled, if that works here.
    """

    compiles = False

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        compile_backend: str | None = None,
        task: Task = IMAGE_CLASSIFICATION,
    ) -> None:
        self.accelerator, self.given, self.task = accelerator, model, task
        if accelerator.ddp_handler is None:
            # DDP refuses parameters that get no gradient otherwise, such as DINOv2's mask token.
            from accelerate.utils import DistributedDataParallelKwargs

            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.model, self.optimizer = accelerator.prepare(model.train(), optimizer)
        if compile_backend is not None:
            self.compiles = True
            self.model = compiled(self.model, compile_backend, accelerator.device)

    def prediction(self, images: Tensor) -> Tensor:
        """Of the task, float32, in the precision that accelerate is configured for."""
        with self.accelerator.autocast():
            prediction = self.task.prediction(self.model(images))
        return prediction.float()

    @contextmanager
    def training_pass(self, last: bool) -> Iterator[None]:
        """Around a forward and a backward pass; processes exchange gradients with the `last` one of a step only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, a scalar."""
        self.accelerator.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, max_norm: float) -> Tensor:
        """Clip gradients, take an optimizer step, forget the gradients. Returns: their norm before clipping."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and optimizer states as whole tensors, on the main process at least. All processes take part."""
        state = self.optimizer.state_dict()["state"]
        moments = {f"{index}.{key}": value for index, entry in state.items() for key, value in entry.items()}
        return self.given.state_dict(), moments

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Continue where `tensors` was taken."""
        self.given.load_state_dict(weights)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in moments.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def share_buffers(self) -> None:
        """Give every process the main one's: since the last forward pass each has its own batch statistics."""
        if self.accelerator.num_processes > 1:
            for buffer in self.given.buffers():
                from accelerate.utils import broadcast

                buffer.copy_(broadcast(buffer.clone()))

    def finish(self) -> nn.Module:
        """End training. Returns: a plain whole model with the trained weights, the same on every process."""
        self.share_buffers()
        self.accelerator.free_memory()
        if self.compiles:  # what is trained next has other layers; there is a limit to what is compiled in one process
            torch.compiler.reset()
        model: nn.Module = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        return model
