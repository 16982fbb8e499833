"""The backend that an accelerate configuration asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.tasks import Task
from fliqs_hf.training.backends.plain import Backend
from fliqs_hf.training.backends.sharded import ShardedBackend
from fliqs_hf.training.backends.zero import ZeroBackend
from fliqs_hf.training.backends.zero_settings import check_zero
from fliqs_hf.training.config import TrainConfig


def backend_for(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, task: Task
) -> Backend:
    kind = str(accelerator.distributed_type)
    if "DEEPSPEED" in kind:
        return ZeroBackend(
            accelerator, model, optimizer, batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps, max_norm=config.max_grad_norm, task=task,
        )  # fmt: skip
    if "FSDP" in kind:
        return ShardedBackend(accelerator, model, optimizer, task=task)
    return Backend(accelerator, model, optimizer, config.compile_backend, task)


def check_support(accelerator: Any, config: TrainConfig) -> None:
    """Raises: ConfigError: what this loop cannot do."""
    kind = str(accelerator.distributed_type)
    if "MEGATRON" in kind:
        raise ConfigError(f"{kind} steps the optimizer by itself, which this loop cannot follow; use DDP or FSDP2")
    if "FSDP" in kind and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ConfigError("FSDP version 1 is not supported: set fsdp_version: 2 in the accelerate config")
    if "DEEPSPEED" in kind:
        check_zero(accelerator)
    if ("FSDP" in kind or "DEEPSPEED" in kind) and (config.ema_decay or config.eval_steps):
        name = "ema_decay" if config.ema_decay else "eval_steps"
        raise ConfigError(
            f"{name}={getattr(config, name)} needs the whole model on every process during training: use DDP, or 0"
        )
    if ("FSDP" in kind or "DEEPSPEED" in kind) and config.compile_backend:
        raise ConfigError(f"torch_compile does not go with {kind}, which shards the model: use DDP, or leave it out")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            f"mixed_precision={accelerator.mixed_precision!r} scales the loss, which a resumed run would not repeat; "
            "choose bf16 or no"
        )
