"""Per-sample Fisher scores against a loop over single images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.cost import LayerInfo, trace_layers
from fliqs_hf.errors import DataError
from fliqs_hf.formats import Format, round_to_format
from fliqs_hf.nn import make_searchable
from fliqs_hf.search import SearchSpace, fisher_scores
from tests.models import images, tiny

FORMATS = ("int2", "e2m1", "int8", "bf16")
LABELS = torch.tensor([0, 3, 1, 4, 2])


def rounded(x: Tensor, fmt: Format, dims: tuple[int, ...]) -> Tensor:
    """Absmax scaling over `dims` and exact rounding, written out."""
    scale = x.abs().amax(dims, keepdim=True) / fmt.max_value if fmt.is_scaled else torch.ones(())
    scale = torch.where(scale == 0, 1.0, scale)
    return round_to_format(x / scale, fmt) * scale


def apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, weight, layer.bias)


def score_one_image(
    model: nn.Module, layer: Any, image: Tensor, label: Tensor, fmt: Format, w: bool, a: bool
) -> float:
    """½·(Σ g·ΔY)² of one layer and one image."""
    seen: dict[str, Tensor] = {}

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["x"] = inputs[0].detach()
        seen["y"] = output
        output.retain_grad()
        return output.clone()  # what follows may work in place

    handle = layer.register_forward_hook(remember)
    logits = model(image[None])
    functional.cross_entropy(getattr(logits, "logits", logits), label[None]).backward()
    handle.remove()
    x, y = seen["x"], seen["y"]
    conv = isinstance(layer, nn.Conv2d)
    with torch.no_grad():
        weight = rounded(layer.weight, fmt, tuple(range(1, layer.weight.dim()))) if w else layer.weight
        value = rounded(x, fmt, (1, 2, 3) if conv else (-1,)) if a else x
        assert y.grad is not None
        return float((y.grad * (apply(layer, value, weight) - y)).sum()) ** 2 / 2


def naive(model: nn.Module, space: SearchSpace, pixels: Tensor, labels: Tensor) -> Tensor:
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    same = space.activation == "same"
    for row, info in enumerate(space.layers):
        layer = model.get_submodule(info.name)
        for k, fmt in enumerate(space.formats):
            for image, label in zip(pixels, labels, strict=True):
                one = (model, layer, image, label, fmt)
                if same:
                    scores[space.weight_decision[row], k] += score_one_image(*one, True, True)
                else:
                    scores[space.weight_decision[row], k] += score_one_image(*one, True, False)
                    scores[space.activation_decision[row], k] += score_one_image(*one, False, True)
    return scores / len(labels)


def small_network() -> nn.Module:
    """Grouped convolution, in-place activation right after a layer, Linear on tokens and on vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, stride=4, groups=2), nn.Flatten(2), nn.Linear(16, 6), nn.GELU(),
        nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def check(model: nn.Module, space: SearchSpace) -> None:
    pixels = images(len(LABELS))
    batches = [(pixels[:2], LABELS[:2]), (pixels[2:], LABELS[2:])]

    def forward(x: Tensor) -> Tensor:
        output = model(x)
        return getattr(output, "logits", output)

    found = fisher_scores(model, batches, forward, space)
    assert found.images == len(LABELS)
    expected = naive(model, space, pixels, LABELS)
    # Both are float32 sums over thousands of elements in different orders, with cancellation; relative to the largest
    # score of the decision, because a format that changes next to nothing has a score of rounding errors.
    error = (found.decision_scores - expected).abs().amax(1) / expected.amax(1)
    assert error.max().item() < 1e-3
    assert bool((expected.amax(1) > 0).all())


@pytest.mark.parametrize("activation", ["same", "separate"])
def test_scores_of_a_small_network(activation: str) -> None:
    model = small_network()
    check(model, SearchSpace(trace_layers(model, images(1)), FORMATS, activation))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_scores_of_transformers(architecture: str) -> None:
    """Swin joins images and windows in one dimension; q, k and v are one decision whose layers' scores add up."""
    model = tiny(architecture)
    layers = [layer for layer in trace_layers(model) if layer.name.split(".")[-1] not in ("fc1", "k_proj")]
    check(model, SearchSpace(layers, ("int2", "e2m1")))


def test_the_product_of_errors_is_left_out_only_where_it_is_small() -> None:
    """Up to 4 bits scores are exact; beyond, two errors of at most 1/32 of the maximum make a small product."""
    model = tiny("vit")
    space = SearchSpace(trace_layers(model)[1:], ("int2", "e2m0", "int3", "int4", "e2m1", "int6", "e4m3"))
    pixels = images(len(LABELS))
    found = fisher_scores(model, [(pixels, LABELS)], lambda x: model(x).logits, space).decision_scores
    ratio = found / naive(model, space, pixels, LABELS)
    torch.testing.assert_close(ratio[:, :5], torch.ones_like(ratio[:, :5]), rtol=0, atol=5e-3)  # float32, see `check`
    assert ratio[:, 5:].min().item() > 0.8
    assert ratio[:, 5:].max().item() < 1.25


def test_batches_do_not_matter_and_the_model_is_left_as_it_was() -> None:
    model = small_network().train()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    space = SearchSpace(trace_layers(model, images(1)), FORMATS)
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    pixels = images(len(LABELS))
    whole = fisher_scores(model, [(pixels, LABELS)], model, space).decision_scores
    split = fisher_scores(model, zip(pixels.split(1), LABELS.split(1), strict=True), model, space).decision_scores
    torch.testing.assert_close(whole, split, rtol=1e-3, atol=1e-3 * whole.max().item())  # float32, see `check`
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_searchable_model_with_its_switch_off_scores_the_same() -> None:
    plain, searchable = small_network(), small_network()
    space = SearchSpace(trace_layers(plain, images(1)), FORMATS)
    switch = make_searchable(searchable, space.formats)
    batches = [(images(len(LABELS)), LABELS)]
    expected = fisher_scores(plain, batches, plain, space).decision_scores
    with switch.disabled():
        assert torch.equal(fisher_scores(searchable, batches, searchable, space).decision_scores, expected)


def test_no_images() -> None:
    model = small_network()
    with pytest.raises(DataError, match="no images"):
        fisher_scores(model, [], model, SearchSpace(trace_layers(model, images(1)), FORMATS))


def test_a_loss_that_is_not_finite() -> None:
    model = small_network()
    space = SearchSpace(trace_layers(model, images(1)), FORMATS)
    with torch.no_grad():
        model[7].bias[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        fisher_scores(model, [(images(5), LABELS)], model, space)


def test_an_input_that_is_overwritten_before_backward() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x)
            x.zero_()
            return y

    model = Overwrites()
    space = SearchSpace([LayerInfo("linear", "linear", 20, 20, 5, 0)], FORMATS)
    with pytest.raises(DataError, match=r"'linear' was changed in place"):
        fisher_scores(model, [(torch.randn(5, 4), LABELS)], model, space)
