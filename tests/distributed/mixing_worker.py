"""A differentiable search in one of several processes; writes where this rank ended."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from fliqs_hf.baselines.differentiable import DifferentiableConfig, DifferentiableHook, differentiable_search
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import StepHook, TrainConfig, train
from tests.helpers.models import tiny
from tests.training.test_loop import Blobs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model, data = tiny("vit"), Blobs(80)
    layers = trace_layers(model)
    space = SearchSpace(layers, ["int3", "int4", "e2m1", "int8"])
    config = DifferentiableConfig("gumbel", 5.0, 0.5, explore_fraction=0.5)
    training = TrainConfig(max_steps=8, batch_size=8, learning_rate=1e-3, gradient_accumulation_steps=2)
    tensors: dict[str, torch.Tensor] = {}

    def run(hook: StepHook) -> None:
        assert isinstance(hook, DifferentiableHook)
        tensors["mixed by"] = hook.search.probabilities(0).detach()
        train(model, data, training, accelerator, hook=hook)
        tensors["logits"] = hook.search.policy.logits.detach()

    problem = SearchProblem(space, CostTable(layers, space.formats), Target.of(target_bits=4.5))
    final = differentiable_search(
        model, problem, run, training.max_steps, config,
        rank=accelerator.process_index, world_size=2, gather=accelerator.gather,
    )  # fmt: skip
    tensors["choice"] = space.choice(final.allocation)
    tensors |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / f"rank-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
