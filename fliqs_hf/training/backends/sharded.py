"""A model that FSDP2 shards, and its weights and optimizer states as whole tensors.

All processes call everything here together.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from fliqs_hf.tasks import Task
from fliqs_hf.training.backends.plain import Backend

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
#: Between the name of a parameter and that of its state; no parameter's name has it.
_SEPARATOR = "|"


class ShardedBackend(Backend):
    """A model that FSDP2 shards."""

    def __init__(self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task) -> None:
        self.whole = copy.deepcopy(model)  # to return: a sharded model stays one
        super().__init__(accelerator, model, optimizer, task=task)

    def step(self, max_norm: float) -> Tensor:
        norm: Any = super().step(max_norm)
        whole: Tensor = norm.full_tensor()
        return whole

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return whole_weights(self.given), whole_optimizer(self.given, self.optimizer)

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        load_whole(self.given, self.optimizer, weights, moments)

    def finish(self) -> nn.Module:
        self.share_buffers()
        self.accelerator.free_memory()
        return gathered_into(self.whole, self.given)


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU of the main process; empty on the others."""
    weights: Any = get_model_state_dict(model, options=_WHOLE)
    return dict(weights)


def whole_optimizer(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """`parameter|state` -> tensor, on the CPU of the main process; empty on the others."""
    found: Any = get_optimizer_state_dict(model, _plain(optimizer), options=_WHOLE)
    state = found.get("state", {})
    return {f"{name}{_SEPARATOR}{key}": value for name, entry in state.items() for key, value in entry.items()}


def load_whole(model: nn.Module, optimizer: Any, weights: dict[str, Tensor], states: dict[str, Tensor]) -> None:
    """Inverse of the two above. The main process's tensors are spread over all."""
    set_model_state_dict(model, dict(weights), options=_SPREAD)
    found: Any = get_optimizer_state_dict(model, _plain(optimizer), options=_WHOLE)
    state: dict[str, dict[str, Tensor]] = {}
    for name, tensor in states.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        state.setdefault(parameter, {})[key] = tensor
    whole: Any = {"state": state, "param_groups": found.get("param_groups", [])}
    set_optimizer_state_dict(model, _plain(optimizer), whole, options=_SPREAD)


def gathered_into(plain: nn.Module, sharded: nn.Module) -> nn.Module:
    """Give `plain`, on every process, the weights of `sharded`."""
    state = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in sharded.state_dict().items()
    }
    plain.load_state_dict(state)
    return plain


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
