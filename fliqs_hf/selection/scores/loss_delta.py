"""What the other scores estimate, measured: how much the loss grows when one decision alone is quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.selection.scores.score import FormatScore, ScorePass


class LossDelta(FormatScore):
    """Increase of the mean loss for each choice of each decision, all else in fp32.

    0 where a weight would have a format for inputs, which no choice takes. One evaluation of all batches per decision
    and format: D·K + 1 passes, where the Fisher score needs one. The batches are held meanwhile.
    """

    name, most_images = "loss-delta", 512

    @torch.no_grad()
    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        space = on.space
        on = replace(on, batches=list(on.batches))

        def of_batch(losses: Any, inputs: Any, targets: Tensor) -> Tensor:
            loss: Tensor = losses(on.forward(inputs), targets)
            return loss

        def loss() -> tuple[float, int]:
            total, images = on.summed(of_batch)
            return float(total) / images, images

        names = [layer.name for layer in space.layers]
        for_weights = next(fmt for fmt in space.formats if not fmt.for_inputs_only)
        switch = make_searchable(on.model, space.formats, names=names, settings=on.settings)
        try:
            with evaluation(on.model):
                with switch.disabled():
                    clean, images = loss()
                scores = torch.zeros(len(space.decisions), len(space.formats))
                for row, decision in enumerate(tqdm(space.decisions, desc="loss deltas")):
                    for column, fmt in enumerate(space.formats):
                        if fmt.for_inputs_only and decision.kind == "weight":
                            continue  # no weight can have it
                        weight = for_weights if decision.kind == "activation" else fmt
                        formats = LayerFormats(weight, None if decision.kind == "weight" else fmt)
                        switch.set_allocation(Allocation(dict.fromkeys(decision.layers, formats)))
                        if decision.kind == "activation":
                            switch.leave_weights()
                        scores[row, column] = loss()[0] - clean
        finally:
            restore(on.model)
        return scores, images


loss_delta_scores = LossDelta()
