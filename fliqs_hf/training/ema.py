"""A moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_PREFIX = "average."


class WeightAverage:
    """Exponential moving average of the parameters of `model`, on their device, in their dtype.

    The decay grows as (1 + t) / (10 + t) up to `decay`, so that early weights do not weigh on a short run.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an optimizer step into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), list(self._parameters.values()), self.updates)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights within."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the trained weights."""
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        return {_PREFIX + name: tensor for name, tensor in self._average.items()}

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Continue bit for bit from a state after `updates` updates; other tensors in `state` are ignored."""
        for name, tensor in self._average.items():
            tensor.copy_(state[_PREFIX + name])
        self.updates = updates
