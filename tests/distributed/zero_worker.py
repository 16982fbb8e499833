"""Trainings with DeepSpeed in one of several processes; writes what this rank has seen.

All in one start, as importing DeepSpeed and its companions takes longer than what is done here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from safetensors.torch import save_file
from torch import nn

from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.errors import FliqsError
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.pipeline import job as recipe_job
from fliqs_hf.pipeline.search import main as recipe
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import TrainConfig, train
from tests.helpers.models import tiny
from tests.recipes.test_vit import write
from tests.training.test_loop import Blobs

NO_CLIPPING = 1e9


class CrashError(Exception):
    pass


class Crashing(SearchHook):
    """Fails before the step that it is told."""

    at = -1

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        if step == self.at:
            raise CrashError
        return super().begin_step(step)


def configure(accelerator: Accelerator, stage: int | None, precision: str = "no", **config: Any) -> None:
    """What another accelerate config would have led to; stage None is DDP."""
    kind = DistributedType.MULTI_CPU if stage is None else DistributedType.DEEPSPEED
    PartialState().distributed_type = accelerator.state.distributed_type = kind
    zero = {"stage": stage or 0, **config.pop("zero_optimization", {})}
    plugin = DeepSpeedPlugin({"zero_optimization": zero, "gradient_accumulation_steps": "auto", **config})
    plugin.set_mixed_precision(precision)
    accelerator.state.deepspeed_plugins = {"default": plugin}
    plugin.select(_from_accelerator_state=True)


def search(
    accelerator: Accelerator, state: Path | None = None, crash_at: int = -1, resume: bool = False, **changes: Any
) -> dict[str, torch.Tensor]:
    """Weights, allocation and logits after a search; a resumed one starts from a model that it must not keep."""
    model, data = tiny("vit", seed=int(resume)), Blobs(80)
    layers = trace_layers(model)
    space = SearchSpace(layers, ["int3", "int4", "e2m1", "int8"])
    config = SearchConfig(prior="none", explore_fraction=0.6, samples_per_step=2)
    ranks: dict[str, Any] = {"rank": accelerator.process_index, "world_size": 2, "gather": accelerator.gather}
    settings: dict[str, Any] = {"max_steps": 5, "batch_size": 4, "learning_rate": 1e-3, "save_steps": 3}
    training = TrainConfig(**settings | {"logging_steps": 2} | changes)
    table, target = CostTable(layers, space.formats), Target.of(target_bits=4.5)
    found = OneShotSearch(SearchProblem(space, table, target), config, training.max_steps, seed=1, **ranks)
    hook = Crashing(found, make_searchable(model, space.formats))
    hook.at = crash_at
    trained = train(model, data, training, accelerator, hook=hook, state_folder=state, resume=resume)
    restore(trained)
    assert type(trained.vit.layers[0].mlp.fc1) is nn.Linear
    assert {type(p) for p in trained.parameters()} == {nn.Parameter}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    tensors = {"logits": found.policy.logits.detach(), "choice": space.choice(found.finalize().allocation)}
    return {**tensors, **{f"model.{name}": tensor for name, tensor in trained.state_dict().items()}}


def interrupted(accelerator: Accelerator, state: Path, **changes: Any) -> dict[str, torch.Tensor]:
    try:
        search(accelerator, state, crash_at=4, **changes)
    except CrashError:
        accelerator.free_memory()
    else:
        raise AssertionError("it did not crash")
    accelerator.wait_for_everyone()
    assert [path.name for path in state.iterdir()] == ["step-00000003"]
    return search(accelerator, state, resume=True, **changes)


def poisoned(accelerator: Accelerator, state: Path) -> None:
    """The gradient of the second step is not a number on this rank alone, its loss is."""
    calls: list[None] = []

    def poison(grad: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return grad * float("nan") if len(calls) == 2 and accelerator.process_index else grad

    model = tiny("vit")
    model.classifier.weight.register_hook(poison)
    settings = TrainConfig(max_steps=4, batch_size=4, save_steps=1, logging_steps=100)
    try:
        train(model, Blobs(40), settings, accelerator, state_folder=state)
    finally:
        accelerator.free_memory()


def refusals(accelerator: Accelerator, folder: Path) -> dict[str, str]:
    """What is said to settings that contradict each other, and to gradients that are not numbers."""
    said: dict[str, str] = {}

    def ask(name: str, stage: int, what: Callable[[], object], precision: str = "no", **config: Any) -> None:
        configure(accelerator, stage, precision, **config)
        try:
            what()
        except FliqsError as error:
            said[name] = f"{type(error).__name__}: {error}"

    def one_step(architecture: str = "vit", **changes: Any) -> None:
        train(tiny(architecture), Blobs(40), TrainConfig(max_steps=1, batch_size=4, **changes), accelerator)

    ask("stage", 0, one_step)
    ask("batch", 2, one_step, train_micro_batch_size_per_gpu=16)
    ask("accumulation", 2, one_step, gradient_accumulation_steps=8)
    ask("clipping", 2, one_step, gradient_clipping=0.5)
    ask("optimizer", 2, one_step, optimizer={"type": "AdamW"})
    ask("scheduler", 2, one_step, scheduler={"type": "WarmupLR"})
    ask("offload", 2, one_step, zero_optimization={"offload_optimizer": {"device": "cpu"}})
    ask("order", 2, one_step, zero_optimization={"round_robin_gradients": True})
    ask("fp16", 2, one_step, "fp16")
    ask("batch norm", 2, lambda: one_step("resnet"), "bf16")
    ask("ema", 2, lambda: one_step(ema_decay=0.9))
    ask("evaluation", 2, lambda: one_step(eval_steps=1))
    for stage in (2, 3):
        ask(f"not finite {stage}", stage, lambda stage=stage: poisoned(accelerator, folder / f"poisoned-{stage}"))
    return said


def run_recipe(accelerator: Accelerator, folder: Path) -> None:
    """Fine-tuning, then a search from its result: two trainings with one Accelerator. Ends its processes' group."""
    configure(accelerator, 3)
    if accelerator.is_main_process:
        steps = {"finetune_steps": 2, "max_steps": 3, "save_steps": 1, "gradient_accumulation_steps": 2}
        write(folder, use_cpu=False, **steps, max_eval_samples=16, search_overrides={"prior_images": 16})
    accelerator.wait_for_everyone()
    recipe_job.Accelerator = lambda **_: accelerator  # type: ignore[assignment,misc]
    recipe([str(folder / "settings.yaml")])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    # Gloo alone: DeepSpeed would first compile a communication of its own, for a minute and with a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # With `cpu` accelerate would not look for DeepSpeed, and without a backend not for several processes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.num_processes == 2
    rank = accelerator.process_index

    def keep(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / f"{name}-rank-{rank}.safetensors")

    for stage in (None, 1, 2, 3):
        configure(accelerator, stage)
        keep(f"unclipped-{stage}", search(accelerator, max_grad_norm=NO_CLIPPING, max_steps=4))
    usual = {"gradient_accumulation_steps": 2}
    configure(accelerator, None)
    keep("usual-None-no", search(accelerator, **usual))
    for stage, precision, zero in ((2, "bf16", {}), (3, "no", {"stage3_param_persistence_threshold": 0})):
        # At 0 small parameters are sharded too: by default a model of this size has none that are.
        configure(accelerator, stage, precision, zero_optimization=zero)
        keep(f"usual-{stage}-{precision}", search(accelerator, **usual))
        keep(f"resumed-{stage}-{precision}", interrupted(accelerator, folder / f"state-{stage}", **usual))
    for stage in (2, 3):
        configure(accelerator, stage, "bf16")
        keep(f"still-{stage}", search(accelerator, max_steps=1, learning_rate=1e-20, weight_decay=0.0))
    (folder / f"refused-rank-{rank}.json").write_text(json.dumps(refusals(accelerator, folder)))
    run_recipe(accelerator, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
