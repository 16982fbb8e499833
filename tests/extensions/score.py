"""A score without gradients: the squared change of each layer's output, over that of the output itself."""

import torch
from torch import Tensor, nn

from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.selection import FormatScore, ScorePass, register_score


class OutputError(FormatScore):
    """Σ ‖ΔY‖² / Σ ‖Y‖², summed over a decision's layers; weights and inputs share a format."""

    name, weights_only = "output-error", True

    @torch.no_grad()
    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        space, layers = on.space, list(on.layers().values())
        errors = torch.zeros(len(layers), len(space.formats) + 1)

        def watch(row: int, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
            kind, rows = kind_of(layer), kind_of(layer).rows(layer, layer.get_parameter("weight"))

            def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
                output = kind.multiply(layer, inputs[0], rows, None)
                errors[row, -1] += output.square().sum()
                for k, fmt in enumerate(space.formats):
                    x, weight = on.settings.inputs(kind.tokens)(inputs[0], fmt), on.settings.weights(rows, fmt)
                    errors[row, k] += (kind.multiply(layer, x, weight, None) - output).square().sum()

            return layer.register_forward_hook(hook)

        handles = [watch(row, layer) for row, layer in enumerate(layers)]
        try:
            _, images = on.summed(lambda losses, x, y: losses(on.forward(x), y))
        finally:
            for handle in handles:
                handle.remove()
        scores = torch.zeros(len(space.decisions), len(space.formats))
        return scores.index_add_(0, space.weight_decision, errors[:, :-1] / errors[:, -1:]), images


register_score(OutputError())
