"""What tests of calibration share."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf import Allocation, LayerFormats
from fliqs_hf.formats import COMMON
from fliqs_hf.nn import quantizable_layers
from tests.helpers.models import images

LAYER = "vit.layers.0.mlp.fc1"
STATIC = ("absmax", "percentile", "mse")


def uniform(model: nn.Module, fmt: str = "int4") -> Allocation:
    return Allocation.uniform(quantizable_layers(model), fmt)


def mixed(model: nn.Module) -> Allocation:
    """Every common format in turn, weights and activations apart, one layer weight-only."""
    weights, activations = itertools.cycle(COMMON), itertools.cycle([*reversed(COMMON), None])
    return Allocation({name: LayerFormats(next(weights), next(activations)) for name in quantizable_layers(model)})


@torch.no_grad()
def logits(model: Any, x: Tensor | None = None) -> Tensor:
    return model(images() if x is None else x).logits


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each quantizable layer of a plain model reads."""
    seen: dict[str, Tensor] = {}
    for name, layer in quantizable_layers(model).items():
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].detach()}))
    logits(model, x)
    return seen
