"""The baselines: allocations at a cost, and loss deltas against doing it by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.baselines import loss_delta_scores, manual, random_allocation, uniform
from fliqs_hf.cost import CostTable, Target, bops, trace_layers
from fliqs_hf.errors import TargetError
from fliqs_hf.formats import parse
from fliqs_hf.nn import make_searchable
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.models import images, tiny

MODEL = tiny("vit")
LAYERS = trace_layers(MODEL)
SPACE = SearchSpace(LAYERS, ["int2", "int4", "e2m1", "int8"])
TABLE = CostTable(LAYERS, SPACE.formats)


def test_uniform_and_manual() -> None:
    assert bops(LAYERS, uniform(LAYERS, "e2m2")) == sum(layer.macs for layer in LAYERS) * 25
    by_hand = manual(LAYERS)
    ends = [LAYERS[0].name, LAYERS[-1].name]
    assert {name for name, formats in by_hand.items() if formats.weight == parse("int8")} == set(ends)
    assert all(formats.weight == parse("int4") for name, formats in by_hand.items() if name not in ends)


def test_random_allocations_meet_the_target_and_differ() -> None:
    target = TABLE.uniform("int4")
    problem = SearchProblem(SPACE, TABLE, Target.of(target_bits=4))
    found = [random_allocation(problem, seed) for seed in range(5)]
    assert all(0.97 <= TABLE.of(allocation) / target <= 1 for allocation in found)
    assert len({allocation.summary() for allocation in found}) > 1
    assert random_allocation(problem, 3) == found[3]
    with pytest.raises(TargetError):
        random_allocation(replace(problem, target=Target("bops", target / 100)), 0)


def test_loss_deltas_are_differences_of_losses() -> None:
    model, labels = copy.deepcopy(MODEL), torch.arange(6) % 5
    batches = [(images(4, seed=1), labels[:4]), (images(2, seed=2), labels[4:])]
    scores = loss_delta_scores(model, batches, lambda x: model(x).logits, SPACE)
    assert scores.shape == (len(SPACE.decisions), 4)
    x = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        clean = functional.cross_entropy(MODEL(x).logits, labels)
        for row, column in ((0, 0), (1, 2), (len(SPACE.decisions) - 1, 1)):
            other = copy.deepcopy(MODEL)
            layers = SPACE.decisions[row].layers
            switch = make_searchable(other, SPACE.formats, names=layers)
            formats = LayerFormats(SPACE.formats[column], SPACE.formats[column])
            switch.set_allocation(Allocation(dict.fromkeys(layers, formats)))
            expected = functional.cross_entropy(other(x).logits, labels) - clean
            assert torch.isclose(scores[row, column], expected, atol=1e-6)  # sums of losses in another order
    assert all(
        type(module).__module__.startswith("torch") for module in model.modules() if hasattr(module, "in_features")
    )
