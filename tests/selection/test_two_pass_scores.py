"""The sensitivity measured again in the quantized model, and shared out among processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.errors import DataError
from fliqs_hf.nn import make_searchable
from fliqs_hf.selection import SearchProblem, SearchSpace, Sensitivity, TwoPass, fisher_scores
from fliqs_hf.selection.scores.fisher import Fisher
from tests.helpers.models import images, tiny
from tests.selection.test_sensitivity import FORMATS, JOINT_BITS, LABELS, apply, logits_of, rounded


def test_processes_share_the_images() -> None:
    """Each of two measures its part; both get the scores of all images, of the first pass and of the second."""
    model, pixels = tiny("vit"), images(len(LABELS))
    space = SearchSpace(trace_layers(model), FORMATS)
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=4))
    parts = [[(pixels[part], LABELS[part])] for part in (slice(0, 2), slice(2, None))]

    def both(measure: Any) -> list[Sensitivity]:
        sums: list[Tensor] = []
        for part in parts:
            measure(part, lambda values: sums.append(values) or values)
        return [measure(part, lambda values: sums[0] + sums[1]) for part in parts]

    def first(batches: Any, combine: Any = None) -> Sensitivity:
        return fisher_scores(model, batches, lambda x: model(x).logits, space, combine=combine)

    whole = first(parts[0] + parts[1])

    def second(batches: Any, combine: Any = None) -> Sensitivity:
        return TwoPass(whole)(model, batches, lambda x: model(x).logits, problem, combine=combine)

    for measure in (first, second):
        everything = measure(parts[0] + parts[1])
        for found in both(measure):
            assert found.images == everything.images == len(LABELS)
            # Sums in another order, of float64, then rounded to float32.
            torch.testing.assert_close(found.decision_scores, everything.decision_scores, rtol=1e-6, atol=0)


def test_a_second_look_is_the_mean_of_scores_before_and_after_quantization() -> None:
    """Against single images in the quantized model: g and x are those of this model, and the error of a Linear's input
    goes through its quantized weight, as there its gradient does."""
    model, pixels = tiny("vit"), images(len(LABELS))
    space = SearchSpace(trace_layers(model), ("int2", "e2m1", "int8"))
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=5))
    batches = list(zip(pixels.split(2), LABELS.split(2), strict=True))
    first = fisher_scores(model, batches, lambda x: model(x).logits, space)
    before = copy.deepcopy(model.state_dict())
    found = TwoPass(first)(model, iter(batches), lambda x: model(x).logits, problem)
    assert (found.images, found.seconds > first.seconds) == (len(LABELS), True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any(hasattr(module, "switch") or module._forward_hooks for module in model.modules())

    allocation = space.allocation(problem.choice_at_target(-first.decision_scores))
    assert len({formats.weight for formats in allocation.values()}) > 1
    make_searchable(model, space.formats, names=list(allocation)).set_allocation(allocation)
    second = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    for row, info in enumerate(space.layers):
        layer: Any = model.get_submodule(info.name)
        conv, dims = isinstance(layer, nn.Conv2d), tuple(range(1, layer.weight.dim()))
        weight = layer.weight.detach()
        now = weight if conv else rounded(weight, allocation[info.name].weight, dims)
        weight_errors = [rounded(weight, fmt, dims) - weight for fmt in space.formats]
        for image, label in zip(pixels, LABELS, strict=True):
            x, g = input_and_gradient(model, layer, image, label)
            for k, fmt in enumerate(space.formats):
                input_error = rounded(x, fmt, (1, 2, 3) if conv else (-1,)) - x
                parts = [(x, weight_errors[k]), (input_error, now)]
                parts += [(input_error, weight_errors[k])] if fmt.bits <= JOINT_BITS else []
                change = sum(apply(layer, *part) - apply(layer, x, 0 * weight) for part in parts)
                second[space.weight_decision[row], k] += float((g * change.detach()).sum()) ** 2 / 2 / len(LABELS)
    expected = (first.decision_scores * second).sqrt()
    error = (found.decision_scores - expected).abs().amax(1) / expected.amax(1)
    assert error.max().item() < 1e-3  # float32, see `check`


def input_and_gradient(model: nn.Module, layer: nn.Module, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer reads for one image, and the gradient of the loss at what it returns."""
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["x"] = inputs[0].detach()
        output.register_hook(lambda gradient: seen.update(g=gradient))

    handle = layer.register_forward_hook(remember)
    functional.cross_entropy(logits_of(model, image[None]), label[None]).backward()
    handle.remove()
    return seen["x"], seen["g"]


def test_a_layer_that_dies_when_quantized_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look that finds no gradient at a layer takes it for a thousandth as sensitive, in the order of formats
    that the first look found; scores whose product float32 cannot hold keep their mean."""
    model = tiny("vit")
    space = SearchSpace(trace_layers(model), FORMATS)
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=4))
    first = torch.rand(len(space.decisions), len(FORMATS)) + 0.1
    first[1] = 1e-30
    second = first.clone()
    second[0] = 0
    monkeypatch.setattr(Fisher, "measure", lambda *_: (second, 5))
    twice = TwoPass(Sensitivity(first, 5, 1.0))(model, [], logits_of, problem).decision_scores
    torch.testing.assert_close(twice[0], first[0] * 1e-3**0.5)
    torch.testing.assert_close(twice[1:], first[1:])


def test_a_second_look_that_fails_leaves_the_model_plain() -> None:
    model = tiny("vit")
    space = SearchSpace(trace_layers(model), FORMATS)
    table = CostTable(space.layers, space.formats)
    first = Sensitivity(torch.rand(len(space.decisions), len(space.formats)), 5, 0.0)
    with pytest.raises(DataError, match="no images"):
        TwoPass(first)(model, [], lambda x: model(x).logits, SearchProblem(space, table, Target.of(target_bits=4)))
    assert not any(hasattr(module, "switch") for module in model.modules())
