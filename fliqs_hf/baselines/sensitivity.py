"""Post-training sensitivity by measuring: how much the loss grows when one decision alone is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.search import SearchSpace
from fliqs_hf.search.sensitivity import Forward


@torch.no_grad()
def loss_delta_scores(
    model: nn.Module, batches: Sequence[tuple[Any, Tensor]], forward: Forward, space: SearchSpace
) -> Tensor:
    """Increase of the mean loss for each choice of each decision, every other layer in fp32: float32 [D, K].

    One evaluation of all `batches` per decision and format: D·K + 1 passes, where the Fisher score needs one.
    Only for spaces with one format for weights and inputs.
    """
    assert space.activation == "same"
    training = model.training
    model.eval()

    def loss() -> float:
        total = sum(functional.cross_entropy(forward(x).float(), y, reduction="sum") for x, y in batches)
        return float(total) / sum(len(y) for _, y in batches)

    switch = make_searchable(model, space.formats, names=[layer.name for layer in space.layers])
    try:
        with switch.disabled():
            clean = loss()
        scores = torch.zeros(len(space.decisions), len(space.formats))
        for row, decision in enumerate(tqdm(space.decisions, desc="loss deltas")):
            for column, fmt in enumerate(space.formats):
                switch.set_allocation(Allocation(dict.fromkeys(decision.layers, LayerFormats(fmt, fmt))))
                scores[row, column] = loss() - clean
        return scores
    finally:
        restore(model)
        model.train(training)
