"""A model with batch norms, trained and measured in one of several processes; writes where this rank ended."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from fliqs_hf.cost import trace_layers
from fliqs_hf.selection import SearchSpace, fisher_scores
from fliqs_hf.training import TrainConfig, train
from fliqs_hf.training.data import train_loader
from tests.helpers.models import tiny
from tests.training.test_loop import Blobs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    rank, ranks, data = accelerator.process_index, accelerator.num_processes, Blobs(64)
    model = train(tiny("resnet"), data, TrainConfig(max_steps=4, batch_size=8, learning_rate=1e-2), accelerator)
    space = SearchSpace(trace_layers(model), ["int3", "e2m1"])
    scores = fisher_scores(
        model, train_loader(data, 8, 0, 0, 4, rank, ranks, 0), lambda x: model(x).logits, space,
        combine=lambda values: accelerator.reduce(values, reduction="sum"),
    )  # fmt: skip
    assert scores.images == 4 * 8 * ranks
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file({"scores": scores.decision_scores, **tensors}, folder / f"rank-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
