"""Searches under DeepSpeed in one of several processes; writes what this rank has seen.

All of them in one start: importing DeepSpeed and its companions takes longer than all that is done here.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import nn

from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.errors import FliqsError
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.search import OneShotSearch, SearchConfig, SearchSpace
from fliqs_hf.search.hook import SearchHook
from fliqs_hf.training import TrainConfig, train
from tests.models import tiny
from tests.training.test_loop import Blobs


class Crash(Exception):
    pass


class Crashing(SearchHook):
    """Fails before the step that it is told."""

    at = -1

    def begin_step(self, step: int) -> Any:
        if step == self.at:
            raise Crash
        return super().begin_step(step)


def configure(accelerator: Accelerator, stage: int | None, precision: str = "no", **more: Any) -> None:
    """What another accelerate config would have done; stage None is DDP."""
    kind = DistributedType.DEEPSPEED if stage is not None else DistributedType.MULTI_CPU
    PartialState().distributed_type = accelerator.state.distributed_type = kind
    zero = {"stage": stage or 0, **more.pop("zero", {})}
    plugin = DeepSpeedPlugin({"zero_optimization": zero, "gradient_accumulation_steps": "auto", **more})
    plugin.set_mixed_precision(precision)
    plugin._set_selected(True)
    accelerator.state.deepspeed_plugins = {"default": plugin}


def search(
    accelerator: Accelerator, state: Path | None = None, crash_at: int = -1, resume: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
    """Weights before and after `restore`, choice and logits."""
    model, data = tiny("vit", seed=3 if resume else 0), Blobs(80)
    layers = trace_layers(model)
    space = SearchSpace(layers, ["int3", "int4", "e2m1", "int8"])
    config = SearchConfig(prior="none", explore_fraction=0.6, samples_per_step=2)
    ranks: dict[str, Any] = {"rank": accelerator.process_index, "world_size": 2, "gather": accelerator.gather}
    table = CostTable(layers, space.formats)
    found = OneShotSearch(space, table, Target.of(target_bits=4.5), config, 12, seed=1, **ranks)
    hook = Crashing(found, make_searchable(model, space.formats))
    hook.at = crash_at
    settings: dict[str, Any] = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    training = TrainConfig(**settings | {"save_steps": 4, "logging_steps": 2} | changes)
    trained = train(model, data, training, accelerator, hook=hook, state_folder=state, resume=resume)
    assert all(type(parameter) is nn.Parameter and parameter.dtype is torch.float32 for parameter in trained.parameters())
    restore(trained)
    assert type(trained.vit.layers[0].mlp.fc1) is nn.Linear
    tensors = {"logits": found.policy.logits.detach(), "choice": space.choice(found.finalize().allocation)}
    return {**tensors, **{f"model.{name}": tensor for name, tensor in trained.state_dict().items()}}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # With `cpu` accelerate would not look for DeepSpeed.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.num_processes == 2
    rank = accelerator.process_index
    import time
    for stage, precision in [(None, "no"), (1, "no"), (2, "no"), (3, "no"), (1, "bf16"), (2, "bf16"), (3, "bf16")]:
        for clip in [1.0, 1e9]:
            t = time.time()
            configure(accelerator, stage, precision)
            a = search(accelerator, max_grad_norm=clip)
            save_file(a, folder / f"{stage}-{precision}-{clip}-{rank}.safetensors")
            if stage and clip == 1.0:
                state = folder / f"state-{stage}-{precision}"
                try:
                    search(accelerator, state, 10)
                except Crash:
                    pass
                else:
                    raise AssertionError
                accelerator.wait_for_everyone()
                print(list(state.iterdir()))
                b = search(accelerator, state, resume=True)
                print("RESUME", stage, precision, [n for n in a if not torch.equal(a[n], b[n])])
            print("TIME", stage, precision, time.time() - t)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
