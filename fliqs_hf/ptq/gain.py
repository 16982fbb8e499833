"""How much of the error that rounding to nearest makes is left by GPTQ, layer by layer.

Scores of formats round weights to nearest, as training does. GPTQ leaves a tenth to a third of that error in what a
layer gives, and nothing of the kind is done to inputs. Formats that are chosen by such scores for a model that GPTQ
will round therefore spend too many bits on weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fliqs_hf.errors import DataError
from fliqs_hf.formats import Format, parse
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.ptq.gptq import DAMPING, gptq_round, input_hessian
from fliqs_hf.ptq.memory import fitting_images, room
from fliqs_hf.quant import WeightQuantizer

logger = logging.getLogger(__name__)

#: The format that is rounded to. On scales of least squared error the ratio is the same in others, within 5 % from 3
#: bits on and 20 % at 2 (13 layers of DeiT-Tiny, INT2 to INT6 and E2M0 to E2M2): what GPTQ gains is a matter of the
#: inputs. On the scales of largest values it is not, as there the lowest bits err by their scales.
FORMAT = "int4"
#: Images that go through the model at once, where so many fit.
BATCH = 32


@torch.no_grad()
def rounding_gain(
    model: Any,
    layers: Mapping[str, nn.Module],
    images: Tensor,
    quantizer: WeightQuantizer | None = None,
    damping: float = DAMPING,
) -> dict[str, float]:
    """For each layer the squared error of its output after GPTQ, over that after rounding to nearest.

    Args:
        model: plain, in fp32; it is left as it is.
        layers: of `model`, by name.
        images: as the model takes them, [images, channels, height, width]. Batches of them go through the model, no
            larger than what fits into memory, once for as many layers as their Hessians leave room for.
        quantizer: whose scales both round on; default: those of least squared error.
    Returns: layer -> ratio, above 0; 1 for a layer without an error, that no image reaches, or whose Hessian has no
        inverse.
    """
    quantizer = quantizer or WeightQuantizer(method="mse")
    fmt, found = parse(FORMAT), dict.fromkeys(layers, 1.0)
    batches = images.split(min(BATCH, max(1, fitting_images(model, images[:1]) // 2)))
    for together in _groups(layers, room(images.device) // 2):
        hessians = _hessians(model, together, batches)
        for name in list(hessians):
            try:
                found[name] = _ratio(layers[name], hessians.pop(name), fmt, quantizer, damping)
            except DataError as error:
                logger.info("%s: taken to be rounded to nearest: %s", name, error)
    return found


def _groups(layers: Mapping[str, nn.Module], most_bytes: int) -> Iterator[dict[str, nn.Module]]:
    """Layers in turn, as many at once as have Hessians of that size together; at least one."""
    group: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        columns = _weight(layer)[0].numel()
        own = 8 * getattr(layer, "groups", 1) * columns**2
        if group and size + own > most_bytes:
            yield group
            group, size = {}, 0
        group[name], size = layer, size + own
    yield group


def _hessians(model: Any, layers: Mapping[str, nn.Module], batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """`input_hessian` of all images, up to a factor, for those of `layers` that they reach."""
    sums: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []

    def hook_of(name: str, images: int) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            own = input_hessian(layer, inputs[0]).mul_(images)  # which is a mean, over as many rows in every image
            sums[name] = sums[name].add_(own) if name in sums else own

        return hook

    with evaluation(model):
        for batch in batches:
            try:
                handles = [layer.register_forward_hook(hook_of(name, len(batch))) for name, layer in layers.items()]
                model(batch)
            finally:
                for handle in handles:
                    handle.remove()
    return sums


def _weight(layer: nn.Module) -> Tensor:
    return kind_of(layer).rows(layer, layer.get_parameter("weight").detach())


def _ratio(layer: nn.Module, hessian: Tensor, fmt: Format, quantizer: WeightQuantizer, damping: float) -> float:
    weight = _weight(layer).float()
    rows = weight.flatten(1)
    rounded = gptq_round(rows, quantizer.scale(weight, fmt)[0].flatten(1), fmt, hessian, damping)
    before = _output_error(quantizer(weight, fmt).flatten(1) - rows, hessian)
    after = _output_error(rounded - rows, hessian)
    ratio = after / before if before > 0 else 1.0
    return ratio if ratio > 0 else 1.0


def _output_error(error: Tensor, hessian: Tensor) -> float:
    """The squared error of the output, in the unit of `hessian` [k, k] or [groups, k, k], for that of the weight
    [out, k]."""
    groups = hessian.view(-1, *hessian.shape[-2:])
    split = error.double().view(len(groups), -1, error.shape[1])
    return float(((split @ groups) * split).sum())
