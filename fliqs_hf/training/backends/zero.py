"""Training with DeepSpeed's ZeRO, stages 1 to 3: one process's share of weights and optimizer states, and the whole.

DeepSpeed is imported only where accelerate is configured to use it. All processes call everything here together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fliqs_hf.errors import ConfigError
from fliqs_hf.tasks import Task
from fliqs_hf.training.backends.plain import Backend
from fliqs_hf.training.backends.zero_settings import filled

#: Adam's moments, as torch names them.
_MOMENTS = ("exp_avg", "exp_avg_sq")
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
                "it before the Accelerator is made, or call fliqs_hf.training.load_models_whole() after that"
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
        with filled(accelerator, settings):
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
        steps = [entry["step"] for entry in self._adam_state().values()]
        return self.whole.state_dict(), moments | {_STEPS: steps[0]}

    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        self._set_weights(weights)
        for name, parameter in self._trained():
            for key in _MOMENTS:
                self._set(parameter, moments[f"{name}{_SEPARATOR}{key}"], key)
        for entry in self._adam_state().values():
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
        size = utils.safe_get_local_fp32_param(parameter).numel()
        padded = nn.functional.pad(value.flatten(), (0, size * self.accelerator.num_processes - value.numel()))
        share = padded[size * self.accelerator.process_index :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, key)

    def _begin_moments(self) -> None:
        """Moments of zero after no step, as `safe_…_optimizer_state` finds none before the first one.

        After it, with several groups of parameters at stages 1 and 2, it would miss those of all but the first.
        """
        sharding = self.optimizer.optimizer
        flat = [parameter for group in sharding.optimizer.param_groups for parameter in group["params"]]
        for one in sharding.fp32_partitioned_groups_flat if self.stage == 3 else flat:
            moments = {key: torch.zeros_like(one) for key in _MOMENTS}
            self._adam_state()[one] = {"step": torch.zeros(()), **moments}
        if self.stage < 3:
            sharding._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.given.named_parameters() if parameter.requires_grad]

    def _adam_state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Of torch's optimizer, inside of DeepSpeed's, inside of accelerate's."""
        state: dict[Tensor, dict[str, Tensor]] = self.optimizer.optimizer.optimizer.state
        return state
