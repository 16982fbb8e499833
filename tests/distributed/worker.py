"""A search in one of several processes; writes what this rank has seen."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file

from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.nn import QuantizerSettings, make_searchable, restore
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import TrainConfig, train
from fliqs_hf.training.backends.sharded import is_sharded
from tests.helpers.models import tiny
from tests.training.test_loop import Blobs


class Recording(SearchHook):
    """Keeps this rank's samples, and dies where it is told to."""

    samples: list[torch.Tensor]
    die_at: int = -1

    def begin_step(self, step: int):  # type: ignore[no-untyped-def]
        if step == self.die_at:
            os._exit(9)
        formats = self.search.begin_step(step)
        self.samples = [*getattr(self, "samples", []), formats[0][0].clone()]
        return [lambda pair=pair: self.switch.set(*pair) for pair in formats]


def shard(accelerator: Accelerator) -> None:
    """What an accelerate config with FSDP2 does on GPUs; accelerate has no way to ask for it on CPUs."""
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["ViTLayer"],
        cpu_ram_efficient_loading=False,
    )  # fmt: skip


def main(folder: Path, die_at: int, resume: bool, sharded: bool, clipped: bool) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if sharded:
        shard(accelerator)
    assert accelerator.num_processes == 2
    model, data = tiny("vit"), Blobs(80)
    layers = trace_layers(model)
    space = SearchSpace(layers, ["int3", "int4", "e2m1", "int8"])
    config = SearchConfig(prior="none", explore_fraction=0.6)
    ranks = {"rank": accelerator.process_index, "world_size": 2, "gather": accelerator.gather}
    table = CostTable(layers, space.formats)
    search = OneShotSearch(SearchProblem(space, table, Target.of(target_bits=4.5)), config, 20, seed=1, **ranks)
    settings = QuantizerSettings(activation_granularity="per_token_clipped" if clipped else "per_token")
    hook = Recording(search, make_searchable(model, space.formats, settings=settings))
    hook.die_at = die_at
    training = TrainConfig(max_steps=20, batch_size=8, learning_rate=1e-3, save_steps=4, logging_steps=2)
    trained = train(model, data, training, accelerator, hook=hook, state_folder=folder / "state", resume=resume)
    assert not is_sharded(trained)
    assert is_sharded(model) == sharded
    factors = [module.clip_factor() for module in trained.modules() if clipped and hasattr(module, "clip_factor")]
    restore(trained)
    assert type(trained.vit.layers[0].mlp.fc1) is torch.nn.Linear
    choice = space.choice(search.finalize().allocation)
    tensors = {"logits": search.policy.logits.detach(), "choice": choice, "samples": torch.stack(hook.samples)}
    tensors |= {"factors": torch.cat(factors).detach()} if factors else {}
    weights = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    save_file(tensors | weights, folder / f"rank-{accelerator.process_index}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *(f"--{word}" in sys.argv for word in ("resume", "fsdp", "clipped")))
