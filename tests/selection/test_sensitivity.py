"""Per-sample Fisher scores against a loop over single images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.cost import LayerInfo, trace_layers
from fliqs_hf.errors import DataError
from fliqs_hf.formats import Format, round_to_format
from fliqs_hf.nn import make_searchable
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.quant import ROW, InputQuantizer, WeightQuantizer, grid_params
from fliqs_hf.quant.scale import mse_scale
from fliqs_hf.selection import SearchSpace, fisher_scores
from fliqs_hf.selection.scores import probes
from fliqs_hf.selection.scores.probes import JOINT_BITS
from fliqs_hf.selection.space import ActivationMode
from tests.helpers.models import images, tiny

FORMATS = ("int2", "e2m1", "int8", "bf16")
LABELS = torch.tensor([0, 3, 1, 4, 2])


def rounded(x: Tensor, fmt: Format, dims: tuple[int, ...] | None, settings: QuantizerSettings | None = None) -> Tensor:
    """Exact rounding with absmax scales over `dims`, written out, or with what `settings` say for a weight."""
    if fmt.scales_itself:  # tested by themselves
        return WeightQuantizer()(x, fmt) if settings is not None else InputQuantizer(ROW)(x, fmt)
    if settings is not None and settings.weight_scale == "mse" and fmt.is_scaled:
        return round_to_format(x / (scale := mse_scale(x, grid_params(fmt), dims)), fmt) * scale
    largest = x.abs().max() if dims is None else x.abs().amax(dims, keepdim=True)
    scale = largest / fmt.max_value if fmt.is_scaled else torch.ones(())
    scale = torch.where(scale == 0, 1.0, scale)
    return round_to_format(x / scale, fmt) * scale


def apply(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return functional.linear(x, weight, layer.bias)


def changes_of_one_image(
    model: nn.Module, layer: Any, image: Tensor, label: Tensor, fmt: Format, settings: QuantizerSettings
) -> tuple[float, float, float]:
    """Σ g·ΔY of one layer and one image, with weight and input quantized, the weight alone, and the input alone."""
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
        per_channel, per_token = tuple(range(1, layer.weight.dim())), (1, 2, 3) if conv else (-1,)
        weight = rounded(
            layer.weight, fmt, per_channel if settings.weight_granularity == "per_channel" else None, settings
        )
        value = rounded(x, fmt, per_token if settings.activation_granularity == "per_token" else None)
        assert y.grad is not None
        pairs = ((value, weight), (x, weight), (value, layer.weight))
        both, by_weight, by_input = (float((y.grad * (apply(layer, *pair) - y)).sum()) for pair in pairs)
    return both, by_weight, by_input


def naive(
    model: nn.Module, space: SearchSpace, pixels: Tensor, labels: Tensor, settings: QuantizerSettings, *, exact: bool
) -> Tensor:
    """By running each layer again per format and image. `exact`: always with the product of the errors of weight and
    input, not only where the definition has it."""
    scores = torch.zeros(len(space.decisions), len(space.formats), dtype=torch.float64)
    same = space.activation == "same"
    for row, info in enumerate(space.layers):
        layer = model.get_submodule(info.name)
        for k, fmt in enumerate(space.formats):
            for image, label in zip(pixels, labels, strict=True):
                both, by_weight, by_input = changes_of_one_image(model, layer, image, label, fmt, settings)
                if same:
                    product = exact or fmt.bits <= JOINT_BITS or overlapping(layer)
                    total = both if product else by_weight + by_input
                    scores[space.weight_decision[row], k] += total**2 / 2
                else:
                    scores[space.weight_decision[row], k] += by_weight**2 / 2
                    scores[space.activation_decision[row], k] += by_input**2 / 2
    return scores / len(labels)


def overlapping(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that is not a Linear on patches; it is run in every format, which is exact."""
    return isinstance(layer, nn.Conv2d) and (layer.stride != layer.kernel_size or layer.groups > 1)


def small_network() -> nn.Module:
    """Grouped convolution, in-place activation right after a layer, Linear on tokens and on vectors."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(4, 8, 3, stride=4, groups=2), nn.Flatten(2), nn.Linear(16, 6), nn.GELU(),
        nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def check(model: nn.Module, space: SearchSpace, settings: QuantizerSettings | None = None, batch: int = 2) -> None:
    pixels = images(len(LABELS))
    batches = list(zip(pixels.split(batch), LABELS.split(batch), strict=True))
    found = fisher_scores(model, batches, lambda x: logits_of(model, x), space, settings)
    assert found.images == len(LABELS)
    expected = naive(model, space, pixels, LABELS, settings or QuantizerSettings(), exact=False)
    # Both are float32 sums over thousands of elements in different orders, with cancellation; relative to the largest
    # score of the decision, because a format that changes next to nothing has a score of rounding errors.
    error = (found.decision_scores - expected).abs().amax(1) / expected.amax(1)
    assert error.max().item() < 1e-3
    assert bool((expected.amax(1) > 0).all())


@pytest.mark.parametrize("activation", ["same", "separate"])
def test_scores_of_a_small_network(activation: ActivationMode) -> None:
    model = small_network()
    check(model, SearchSpace(trace_layers(model, images(1)), FORMATS, activation))


def test_scores_of_formats_with_scales_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(2), nn.Linear(images(1)[0, 0].numel(), 40), nn.GELU(), nn.Flatten(),
                          nn.Linear(120, 5))  # fmt: skip
    layers = trace_layers(model, images(1))
    check(model, SearchSpace(layers, ("int3", "mxfp4", "int3_g16", "nvfp4")))
    check(model, SearchSpace(layers, ("int3", "mxint8", "int4_g32"), "separate"))


@pytest.mark.parametrize("architecture", ["vit", "swin"])
def test_scores_of_transformers(architecture: str) -> None:
    """Swin joins images and windows in one dimension; q, k and v are one decision whose layers' scores add up, also
    where one of the layers that read a tensor is not in the space."""
    model = tiny(architecture)
    layers = [layer for layer in trace_layers(model) if layer.name.split(".")[-1] not in ("fc1", "k_proj")]
    check(model, SearchSpace(layers, ("int2", "e2m1")))


@pytest.mark.parametrize("activation", ["same", "separate"])
def test_layers_that_read_one_tensor(activation: ActivationMode) -> None:
    model = tiny("vit")
    layers = [layer for layer in trace_layers(model) if layer.name.split(".")[-1] in ("q_proj", "k_proj", "v_proj")]
    assert len({layer.input_group for layer in layers}) < len(layers)
    check(model, SearchSpace(layers, FORMATS, activation))


@pytest.mark.parametrize(
    "settings",
    [
        QuantizerSettings(weight_scale="mse"),
        QuantizerSettings(weight_granularity="per_tensor"),
        # one scale for the batch, as the images of one batch are not independent then
        QuantizerSettings(activation_granularity="per_tensor"),
    ],
    ids=["mse", "one scale per weight", "one scale per input"],
)
def test_other_settings(settings: QuantizerSettings) -> None:
    model = small_network()
    check(model, SearchSpace(trace_layers(model, images(1)), FORMATS), settings, batch=1)


def test_an_image_in_several_parts_and_tokens_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_INPUT_PART", 100)
    monkeypatch.setattr(probes, "_GRADIENT_PART", 100)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), nn.Flatten(2),
        nn.Linear(16, 6, bias=False), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[0].bias[0] = -100
    space = SearchSpace(trace_layers(model, images(1)), FORMATS)
    check(model, space, batch=5)


def test_an_output_that_is_not_used() -> None:
    """The other layer that reads the tensor has its score, this one 0."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            y: Tensor = self.used(x)
            return y

    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 4)
    layers = [LayerInfo(name, "linear", 20, 20, 5, 0) for name in ("used", "unused")]
    # separate decisions: layers of one input group have one
    both = SearchSpace([replace(layer, input_group=i) for i, layer in enumerate(layers)], FORMATS)
    found = fisher_scores(model, [(x, LABELS)], model, both).decision_scores
    alone = fisher_scores(model, [(x, LABELS)], model, SearchSpace(layers[:1], FORMATS)).decision_scores
    torch.testing.assert_close(found[0], alone[0], rtol=1e-6, atol=0)  # the same arithmetic
    assert found[0, 0] > 0
    assert bool((found[1] == 0).all())


def test_the_product_of_errors_is_left_out_only_where_it_is_small() -> None:
    """Scores are exact at 2 bits; beyond, two errors of at most 1/6 (INT3), 1/14 (INT4) … of the maximum."""
    model = tiny("vit")
    space = SearchSpace(trace_layers(model), ("int2", "int3", "e2m0", "int4", "e2m1", "int6", "e4m3"))
    pixels = images(len(LABELS))
    found = fisher_scores(model, [(pixels, LABELS)], lambda x: model(x).logits, space).decision_scores
    ratio = found / naive(model, space, pixels, LABELS, QuantizerSettings(), exact=True)
    torch.testing.assert_close(ratio[:, 0], torch.ones_like(ratio[:, 0]), rtol=0, atol=5e-3)  # float32, see `check`
    low, high = ratio[:, 1:].quantile(0.1), ratio[:, 1:].quantile(0.9)  # single ones of 5 images may cancel to nothing
    assert 0.7 < low.item() < high.item() < 1.4


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


def test_a_forward_pass_between_batches_does_not_matter() -> None:
    model, pixels = small_network(), images(len(LABELS))
    space = SearchSpace(trace_layers(model, images(1)), FORMATS)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in zip(pixels.split(2), LABELS.split(2), strict=True):
            model(x)
            with torch.no_grad():
                model(x)
            yield x, y

    found = fisher_scores(model, batches(), model, space).decision_scores
    plain = zip(pixels.split(2), LABELS.split(2), strict=True)
    assert torch.equal(found, fisher_scores(model, plain, model, space).decision_scores)


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
