"""What the allocations of a search space cost, with everything that no allocation changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from safetensors.torch import save

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import CostTable, LayerInfo, Target, weight_bytes
from fliqs_hf.cost.models import find
from fliqs_hf.hf import FLIQSConfig, quantize
from fliqs_hf.nn import QuantizerSettings, make_searchable
from fliqs_hf.selection import CostLimit, SearchProblem, SearchSpace
from fliqs_hf.selection.rules import parse_rules
from fliqs_hf.training.arguments import SearchArguments


def search_space(args: SearchArguments, layers: Sequence[LayerInfo]) -> SearchSpace:
    """Args: args: of `settled`. Raises: ConfigError: rules that leave a layer without a format."""
    assert args.search_space and args.activation, "`settled` sets them"
    named = args.search_space[0] if len(args.search_space) == 1 else args.search_space
    return SearchSpace(layers, named, args.activation, args.tie or (), **parse_rules(args.require, args.min_bits))


def search_problem(
    model: Any,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    target: Target | Sequence[Target] | str,
    settings: QuantizerSettings | None = None,
    limits: Sequence[Target] = (),
) -> SearchProblem:
    """What is searched, with the costs that the target is measured by.

    Args:
        model: the fp32 model. layers: all that were traced; those outside of the space stay in fp32.
        target: several are to be met together, each as a limit that is never exceeded; the name of a cost is none.
        limits: on other costs, beside a target that may be two-sided.
    Returns: costs whose `fixed_cost` is that of the layers in fp32; in bytes, that of everything else in the file of
        the packed model, header included.
    """
    if isinstance(target, str):
        return SearchProblem(space, _costs(model, layers, space, target, settings))
    targets = [target] if isinstance(target, Target) else list(target)
    if len(targets) > 1:
        targets = [replace(one, cap=True) for one in targets]
    targets += [replace(one, cap=True) for one in limits]
    first, *others = (CostLimit(_costs(model, layers, space, one.cost_kind, settings), one) for one in targets)
    return SearchProblem(space, first.costs, first.target, tuple(others))


def _costs(
    model: Any, layers: Sequence[LayerInfo], space: SearchSpace, kind: str, settings: QuantizerSettings | None
) -> CostTable:
    cost = find(kind)
    searched = {layer.name for layer in space.layers}
    if cost.of_file:
        fixed: float = _file_bytes(model, space, settings or QuantizerSettings())
    else:
        fixed = sum(cost.layer(layer, None) for layer in layers if layer.name not in searched)
    peak = max((cost.peak_of(layer, None) for layer in layers if layer.name not in searched), default=0.0)
    return CostTable(
        space.layers, space.formats, cost, fixed_cost=fixed, fixed_peak=peak, alike=space.activation == "same"
    )


def _file_bytes(model: Any, space: SearchSpace, settings: QuantizerSettings) -> int:
    """Bytes of the packed file beside weights and scales: other tensors, header, learned factors of inputs.

    From a model that is packed in INT8, as no other format has more tensors or longer offsets.
    """
    allocation = Allocation.uniform([layer.name for layer in space.layers], "int8")
    config = FLIQSConfig(allocation=allocation, activation_granularity=settings.activation_granularity)
    whole = copy.deepcopy(model)
    make_searchable(whole, ["int8"], names=list(allocation), settings=settings)
    packed = quantize(whole, config)
    data = save({name: tensor.contiguous() for name, tensor in packed.state_dict().items()}, {"format": "pt"})
    return len(data) - weight_bytes(space.layers, allocation)
