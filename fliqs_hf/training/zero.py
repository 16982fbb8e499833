"""Training with DeepSpeed's ZeRO, stages 1 to 3: one process's share of weights and optimizer states, and the whole.

DeepSpeed is imported only where accelerate is configured to use it. All processes call everything here together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fliqs_hf.errors import ConfigError
from fliqs_hf.tasks import Task
from fliqs_hf.training.backends import Backend

#: Adam's moments, as torch names them.
_MOMENTS = ("exp_avg", "exp_avg_sq")
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
#: The number of optimizer steps, beside `<parameter>|<moment>`; no parameter's name has the separator.
_SEPARATOR, _STEPS = "|", "|step"


class ZeroBackend(Backend):
    """A model whose optimizer states (stage 1), gradients (2) and weights (3) DeepSpeed shards.

    Under bf16 DeepSpeed keeps the model in bfloat16 and sharded float32 weights beside it. Only these are saved and
    returned.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        accumulation: int,
        max_norm: float,
        task: Task,
    ) -> None:
        """
        Args:
            batch_size: images of one forward pass of one process.
            accumulation: forward passes of one optimizer step.
        Raises: ConfigError: a DeepSpeed configuration that contradicts these, or that is not supported.
        """
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ConfigError(
                "the model was loaded in shards (deepspeed.zero.Init), but costs and checkpoints need it whole: load "
                "it before the Accelerator is made, or call fliqs_hf.training.zero.load_models_whole() after that"
            )
        if accelerator.mixed_precision == "bf16" and any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise ConfigError(
                "DeepSpeed's bf16 leaves the statistics of batch norms in float32, which torch cannot mix: "
                "set mixed_precision: 'no', or use DDP"
            )
        settings = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": batch_size * accumulation * accelerator.num_processes,
            "gradient_clipping": max_norm,
        }
        self.whole = copy.deepcopy(model)  # to return: a model of DeepSpeed's stays one
        with _filled(accelerator, settings):
            super().__init__(accelerator, model, optimizer, task=task)
        self.stage = accelerator.state.deepspeed_plugin.zero_stage
        # DeepSpeed makes its float32 weights from the bfloat16 ones: these lack the digits of the originals.
        self._set_weights(self.whole.state_dict())
        self._begin_moments()

    def prediction(self, images: Tensor) -> Tensor:
        dtype = next(parameter.dtype for parameter in self.given.parameters() if parameter.is_floating_point())
        return self.task.prediction(self.model(images.to(dtype))).float()

    @contextmanager
    def training_pass(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # Not accelerate's, which takes the optimizer step too: the comparison passes of the step come before that.
        self.model.backward(loss, scale_wrt_gas=False)

    def step(self, max_norm: float) -> Tensor:
        self.model.step()
        norm = torch.as_tensor(self.model.get_global_grad_norm(), device=self.accelerator.device)
        # DeepSpeed says -1 (or inf, and skips the step) where a gradient is not finite.
        return norm.float().masked_fill(norm < 0, math.nan)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._gather()
        moments = {
            f"{name}{_SEPARATOR}{key}": safe_get_full_optimizer_state(parameter, key).cpu()
            for name, parameter in self._trained()
            for key in _MOMENTS
        }
        steps = [entry["step"] for entry in self._adam().state.values()]
        return self.whole.state_dict(), moments | {_STEPS: steps[0]}

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor], image: Callable[[], Tensor]) -> None:
        self._link_moments(image())
        self._set_weights(weights)
        for name, parameter in self._trained():
            for key in _MOMENTS:
                self._set(parameter, moments[f"{name}{_SEPARATOR}{key}"], key)
        for entry in self._adam().state.values():
            entry["step"].copy_(moments[_STEPS])

    def finish(self) -> nn.Module:
        self._gather()
        self.accelerator.free_memory()
        return self.whole

    def _gather(self) -> None:
        """Give `whole` the trained weights, and the main process's buffers."""
        from deepspeed.utils import safe_get_full_fp32_param

        plain = dict(self.whole.named_parameters())
        with torch.no_grad():
            for name, parameter in self._trained():
                plain[name].copy_(safe_get_full_fp32_param(parameter))
            for mine, theirs in zip(self.whole.buffers(), self.given.buffers(), strict=True):
                from accelerate.utils import broadcast

                mine.copy_(broadcast(theirs.clone()))

    def _set_weights(self, weights: dict[str, Tensor]) -> None:
        """Inverse of `_gather`, in the float32 weights and in those that the model computes with."""
        from deepspeed import zero

        self.whole.load_state_dict(weights)
        plain = dict(self.whole.named_parameters())
        for name, parameter in self._trained():
            with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3):
                parameter.copy_(plain[name])
            self._set(parameter, plain[name].detach(), None)
        for mine, theirs in zip(self.whole.buffers(), self.given.buffers(), strict=True):
            theirs.copy_(mine)

    def _set(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """Set this process's share of the float32 weight, or of the moment `key`, of which `value` is the whole."""
        from deepspeed import utils

        value = value.to(self.accelerator.device, torch.float32)
        if self.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's own setters of whole tensors fail at stage 3 where the processes do not divide their length.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        share = padded[size * self.accelerator.process_index :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, key)

    def _begin_moments(self) -> None:
        """Moments of zero after no step: those that DeepSpeed finds missing after its first step it never finds.

        With several groups of parameters it looks for those of all groups when the first group has been stepped
        (stages 1 and 2, DeepSpeed 0.19).
        """
        adam = self._adam()
        self.set_learning_rate(0.0)
        flat = [parameter for group in adam.param_groups for parameter in group["params"]]
        for parameter in flat:
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
        for parameter in flat:
            parameter.grad = None
            adam.state[parameter]["step"].zero_()

    def _link_moments(self, image: Tensor) -> None:
        """A step without gradient and learning rate: DeepSpeed gives access to moments only after its first step."""
        self.set_learning_rate(0.0)
        self.model.eval()  # one image has no batch statistics
        with self.training_pass(last=True):
            self.backward(0 * self.prediction(image.to(self.accelerator.device)).sum())
        self.model.step()
        self.model.train()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.given.named_parameters() if parameter.requires_grad]

    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer inside of DeepSpeed's inside of accelerate's."""
        inner: torch.optim.Optimizer = self.optimizer.optimizer.optimizer
        return inner


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
def _filled(accelerator: Any, settings: dict[str, float]) -> Iterator[None]:
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
