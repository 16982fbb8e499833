"""DeepSpeed's configuration: what this package can train with, and what it fills in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fliqs_hf.errors import ConfigError

#: Settings of `zero_optimization` with the one value that is supported. `round_robin_gradients` stores weights in
#: another order than DeepSpeed's access to whole ones reads (0.19.8); the others are untried.
_FIXED = {
    "round_robin_gradients": False,
    "compute_grad_norm": True,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
    "zenflow": None,
}


def load_models_whole() -> None:
    """Have `from_pretrained` load whole models: with ZeRO 3 configured it would give each process a share.

    To be called when the Accelerator is made; without DeepSpeed it does nothing.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_zero(accelerator: Any) -> None:
    """Raises: ConfigError: a DeepSpeed configuration that this loop cannot train with."""
    plugin = accelerator.state.deepspeed_plugin
    given = plugin.deepspeed_config
    if plugin.zero_stage == 0:
        raise ConfigError("zero_stage=0 shards nothing: use DDP (distributed_type: MULTI_GPU), or stages 1 to 3")
    for section, remedy in (
        ("optimizer", "this loop has its own: remove the section, and set learning_rate and weight_decay instead"),
        ("scheduler", "this loop has its own: remove the section, and set learning_rate and warmup_ratio instead"),
        ("torch_autocast", "choose mixed_precision: bf16 in the accelerate config instead"),
    ):
        if given.get(section):
            raise ConfigError(f"the DeepSpeed config has a section {section!r}: {remedy}")
    zero = given.get("zero_optimization", {})
    for key, value in _FIXED.items():
        if zero.get(key, value) != value:
            raise ConfigError(f"zero_optimization.{key}={zero[key]!r} is not supported: remove it from the config")
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get(section) or {}).get("device", "none")
        if device not in ("none", None):
            raise ConfigError(
                f"{section} to {device!r} replaces the optimizer, which is not supported; set it to none"
            )


@contextmanager
def filled(accelerator: Any, settings: dict[str, float]) -> Iterator[None]:
    """The DeepSpeed configuration with `settings`, as long as this context: the next training may have others.

    Raises: ConfigError: it says something else.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    given = copy.deepcopy(config)
    for key, value in settings.items():
        if given.get(key, "auto") != "auto" and given[key] != value:
            raise ConfigError(
                f"the DeepSpeed config says {key}={given[key]!r}, but this training has {value!r}: remove it there or "
                "set it to auto"
            )
    accelerator.gradient_accumulation_steps = settings["gradient_accumulation_steps"]
    config.update(settings)
    try:
        yield
    finally:
        # A copy: DeepSpeed goes on to read the one that it was given.
        plugin.hf_ds_config.config = plugin.deepspeed_config = given
