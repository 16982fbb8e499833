"""What all scores have in common; those beside Fisher's against naive loops, finite problems and exact Hessians."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import CostTable, LayerInfo, Target, trace_layers
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.nn import make_searchable
from fliqs_hf.quant import IMAGE, ROW, quantize_activation, quantize_weight
from fliqs_hf.selection import (
    FormatScore,
    Repeatable,
    ScorePass,
    SearchProblem,
    SearchSpace,
    Sensitivity,
    TwoPass,
    find_score,
    register_score,
    scores,
    unregister_score,
)
from fliqs_hf.selection.scores import (
    HessianTrace,
    TypeAwareFisher,
    elementwise_scores,
    fisher_traces,
    hessian_trace_scores,
    hessian_traces,
    lampq_scores,
    loss_delta_scores,
)
from fliqs_hf.selection.scores.lampq import levelled
from tests.helpers.models import images, tiny

FORMATS = ("int2", "e2m1", "int8", "bf16")
LABELS = torch.tensor([0, 3, 1, 4, 2])


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def naive_elementwise(model: Any, space: SearchSpace, pixels: Tensor, labels: Tensor) -> Tensor:
    """By running each layer again per format, all images in one batch."""
    scores = torch.zeros(len(space.decisions), len(space.formats))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output.retain_grad()
            seen[name] = inputs[0].detach(), output
            return output.clone()

        return hook

    handles = [model.get_submodule(info.name).register_forward_hook(remember(info.name)) for info in space.layers]
    functional.cross_entropy(logits_of(model, pixels), labels, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for row, info in enumerate(space.layers):
        layer, (x, y) = model.get_submodule(info.name), seen[info.name]
        weight, kind = layer.weight.detach().clone(), IMAGE if isinstance(layer, nn.Conv2d) else ROW
        for k, fmt in enumerate(space.formats):
            quantized = quantize_weight(weight, fmt, "per_channel", "absmax", integer=fmt.is_integer)
            value = quantize_activation(x, fmt, kind, "per_token", integer=fmt.is_integer)
            for decision, w, a in (
                [(space.weight_decision[row], quantized, value)]
                if space.activation == "same"
                else [(space.weight_decision[row], quantized, x), (space.activation_decision[row], weight, value)]
            ):
                with torch.no_grad():
                    layer.weight.copy_(w)
                    change = layer(a) - y
                    layer.weight.copy_(weight)
                assert y.grad is not None
                scores[decision, k] += (y.grad * change).square().sum() / len(labels)
    model.zero_grad(set_to_none=True)
    return scores.detach()


@pytest.mark.parametrize("activation", ["same", "separate"])
@pytest.mark.parametrize("architecture", ["vit", "swin", "resnet"])
def test_elementwise_scores(architecture: str, activation: Any) -> None:
    model, pixels = tiny(architecture), images(len(LABELS))
    space = SearchSpace(trace_layers(model), FORMATS, activation)
    batches = [(pixels[:2], LABELS[:2]), (pixels[2:], LABELS[2:])]
    found = elementwise_scores(model, batches, lambda x: logits_of(model, x), space).decision_scores
    expected = naive_elementwise(model, space, pixels, LABELS)
    assert found.dtype == torch.float32
    # float32 in batches of another size; squares do not cancel, but rounding may fall on the other side
    assert ((found - expected).abs().amax(1) / expected.amax(1)).max().item() < 1e-3


def test_elementwise_scores_of_no_images() -> None:
    model = tiny("vit")
    with pytest.raises(DataError, match="no images"):
        elementwise_scores(model, [], model, SearchSpace(trace_layers(model), FORMATS))


def mlp() -> tuple[nn.Module, SearchSpace, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5))
    layers = [LayerInfo("0", "linear", 12, 12, 3, 0), LayerInfo("2", "linear", 15, 15, 5, 1)]
    x = torch.randn(5, 4)
    return model, SearchSpace(layers, FORMATS), [(x[:2], LABELS[:2]), (x[2:], LABELS[2:])]


def exact_hessian(model: nn.Module, x: Tensor, labels: Tensor, names: tuple[str, ...]) -> Tensor:
    """Of the mean loss for all named weights together, [n, n]."""
    weights = tuple(model.get_parameter(name).detach() for name in names)

    def loss(*values: Tensor) -> Tensor:
        changed = dict(zip(names, values, strict=True))
        return functional.cross_entropy(torch.func.functional_call(model, changed, (x,)), labels)

    blocks: Any = torch.autograd.functional.hessian(loss, weights)
    sizes = [weight.numel() for weight in weights]
    rows = [
        [block.reshape(n, m) for block, m in zip(row, sizes, strict=True)]
        for row, n in zip(blocks, sizes, strict=True)
    ]
    return torch.cat([torch.cat(row, 1) for row in rows]).detach().double()


def test_hessian_traces_converge_to_the_exact_ones() -> None:
    """Within 2.5 standard errors, which follow from the Hessian: entry ij of a layer's rows adds H_ij² per probe,
    twice inside the layer's own block."""
    model, space, batches = mlp()
    x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    hessian, probes = exact_hessian(model, x, labels, ("0.weight", "2.weight")), 4000
    found = hessian_traces(ScorePass(model, [(x, labels)], model, space), probes=probes)[0]
    for layer, rows in enumerate((slice(0, 12), slice(12, 27))):
        own, every = hessian[rows, rows], hessian[rows]
        variance = every.square().sum() + own.square().sum() - 2 * own.diagonal().square().sum()
        assert abs(found[layer] - own.trace()) < 2.5 * (variance / probes).sqrt()
        assert own.trace().abs() > 2.5 * (variance / probes).sqrt()  # else the test would say nothing


def test_the_seed_chooses_the_probes() -> None:
    model, space, batches = mlp()
    first, same, other = (hessian_traces(ScorePass(model, batches, model, space), seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_hessian_traces_of_one_linear_layer_have_a_closed_form() -> None:
    """Cross-entropy of W x: the Hessian is (diag p − p pᵀ) ⊗ x xᵀ, its trace ‖x‖² (1 − ‖p‖²)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    space = SearchSpace([LayerInfo("0", "linear", 20, 20, 5, 0)], FORMATS)
    x = torch.randn(5, 4)
    p = model(x).softmax(-1).detach()
    expected = (x.square().sum(-1) * (1 - p.square().sum(-1))).mean()
    found = hessian_traces(ScorePass(model, [(x[:2], LABELS[:2]), (x[2:], LABELS[2:])], model, space), probes=4000)[0]
    assert abs(found.item() / expected.item() - 1) < 0.03


def test_loss_deltas_of_formats_for_inputs() -> None:
    """Which no weight can have: an input is measured in them, whatever stands first in the space."""
    model, labels = tiny("vit"), torch.arange(4) % 5
    space = SearchSpace(trace_layers(model), ["int4_zp", "int4", "int8_zp"], "separate")
    found = loss_delta_scores(model, [(images(4), labels)], lambda x: model(x).logits, space).decision_scores
    weights = torch.tensor([decision.kind == "weight" for decision in space.decisions])
    assert not found[weights][:, [0, 2]].any() and found[weights][:, 1].all() and found[~weights].all()
    other = copy.deepcopy(model)
    row = int((~weights).nonzero()[-1])
    (name,) = space.decisions[row].layers
    layer = other.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: quantize_activation(args[0], space.formats[2], ROW))
    with torch.no_grad():
        expected = functional.cross_entropy(other(images(4)).logits, labels)
        expected = expected - functional.cross_entropy(model(images(4)).logits, labels)
    assert torch.isclose(found[row, 2], expected, atol=1e-6)  # sums of losses in another order


def test_hessian_trace_scores_are_mean_traces_times_squared_errors() -> None:
    model, space, batches = mlp()
    traces = hessian_traces(ScorePass(model, batches, model, space), probes=8)[0]
    scores = HessianTrace(probes=8)(model, batches, model, space).decision_scores
    for row, name in enumerate(("0", "2")):
        weight = model.get_parameter(f"{name}.weight").detach()
        for k, fmt in enumerate(space.formats):
            quantized = quantize_weight(weight, fmt, "per_channel", "absmax", integer=fmt.is_integer)
            error = (quantized - weight).square().sum()
            expected = traces[row].clamp(min=0) / weight.numel() * error
            torch.testing.assert_close(scores[row, k].double(), expected.double(), rtol=1e-5, atol=0)


def test_errors_of_transposed_weights_are_of_their_rows() -> None:
    """Conv1D keeps [in, out], and has one scale per output channel all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(3, 4), nn.Tanh(), Conv1D(5, 3))
    other = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5))
    for row in (0, 2):
        other[row].load_state_dict({"weight": model[row].weight.detach().t(), "bias": model[row].bias.detach()})  # type: ignore[operator, union-attr]
    layers = [LayerInfo("0", "linear", 12, 12, 3, 0), LayerInfo("2", "linear", 15, 15, 5, 1)]
    one, same = (ScorePass(net, [], net, SearchSpace(layers, FORMATS)).weight_errors() for net in (model, other))
    assert torch.equal(one, same) and len(set(one.flatten().tolist())) == 8


def test_fisher_traces_of_one_linear_layer_have_a_closed_form() -> None:
    """The gradient of an image's cross-entropy of W x is (p − e_y) xᵀ: its square is ‖p − e_y‖² ‖x‖²."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    space = SearchSpace([LayerInfo("0", "linear", 20, 20, 5, 0)], FORMATS)
    x = torch.randn(5, 4)
    residual = model(x).softmax(-1).detach() - functional.one_hot(LABELS, 5)
    expected = (x.square().sum(-1) * residual.square().sum(-1)).double().mean() / 20
    found, images = fisher_traces(ScorePass(model, [(x[:2], LABELS[:2]), (x[2:], LABELS[2:])], model, space))
    assert images == 5
    torch.testing.assert_close(found, expected[None], rtol=1e-5, atol=0)  # gradients are float32


def test_levelled_traces_have_mean_1_in_every_type() -> None:
    names = ["blocks.0.fc1", "blocks.10.fc1", "blocks.2.fc2", "head", "dead.0", "dead.1"]
    found = levelled(torch.tensor([1.0, 3.0, 500.0, 7.0, 0.0, 0.0], dtype=torch.float64), names)
    assert found.tolist() == [0.5, 1.5, 1.0, 1.0, 0.0, 0.0]


def test_lampq_scores_are_levelled_traces_times_squared_errors_measured_again_in_the_quantized_model() -> None:
    model, space, batches = mlp()
    space = SearchSpace(space.layers, [f"int{bits}" for bits in range(2, 9)])
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=4, cap=True))
    traces = fisher_traces(ScorePass(model, batches, model, space))[0]
    errors = ScorePass(model, batches, model, space).weight_errors()
    expected = levelled(traces, ["0", "2"])[:, None] * errors
    first = TypeAwareFisher(updates=0)(model, batches, model, problem).decision_scores
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=0)
    assert levelled(traces, ["0", "2"]).tolist() != [1, 1]  # one type, whose traces differ

    other = copy.deepcopy(model)
    switch = make_searchable(other, space.formats, names=["0", "2"])
    switch.set_allocation(space.allocation(problem.choice_at_target(-first)))
    again = fisher_traces(ScorePass(other, batches, other, space))[0]
    second = TypeAwareFisher(updates=1)(model, batches, model, problem).decision_scores
    torch.testing.assert_close(second.double(), levelled(again, ["0", "2"])[:, None] * errors, rtol=1e-6, atol=0)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("architecture", ["vit", "swin", "resnet"])
def test_hessian_trace_scores_of_real_architectures(architecture: str) -> None:
    """Fused attention has no second derivative; layers of one decision add up; the model is left as it was."""
    model = tiny(architecture).train()
    frozen = next(model.parameters()).requires_grad_(False)
    space = SearchSpace(trace_layers(model), FORMATS)
    scores = hessian_trace_scores(model, [(images(5), LABELS)], lambda x: logits_of(model, x), space).decision_scores
    assert scores.shape == (len(space.decisions), 4) and scores.dtype == torch.float32
    assert bool(scores.isfinite().all()) and bool((scores >= 0).all()) and bool((scores[:, 0] >= scores[:, 2]).all())
    assert model.training and not frozen.requires_grad
    assert all(p.grad is None and (p.requires_grad or p is frozen) for p in model.parameters())


def test_a_layer_that_is_not_reached_scores_0() -> None:
    model, space, batches = mlp()
    model.add_module("unused", nn.Linear(2, 2))
    space = SearchSpace([*space.layers, LayerInfo("unused", "linear", 4, 4, 2, 2)], FORMATS)
    forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[index] # noqa: E731
    assert hessian_traces(ScorePass(model, batches, forward, space))[0][2].item() == 0


def test_errors() -> None:
    model, space, batches = mlp()
    with pytest.raises(ConfigError, match="weights only"):
        hessian_trace_scores(model, batches, model, SearchSpace(space.layers, FORMATS, "separate"))
    with pytest.raises(ConfigError, match="probes=0"):
        HessianTrace(probes=0)
    with pytest.raises(ConfigError, match="updates=-1"):
        TypeAwareFisher(updates=-1)
    with pytest.raises(ConfigError, match="'lampq' is measured at a target"):
        lampq_scores(model, batches, model, space)
    with pytest.raises(DataError, match="no images"):
        hessian_trace_scores(model, [], model, space)
    with torch.no_grad():
        model[2].bias[0] = torch.nan  # type: ignore[index]
    with pytest.raises(DataError, match="not finite"):
        hessian_trace_scores(model, batches, model, space)


def test_loss_deltas_are_differences_of_losses() -> None:
    plain = tiny("vit")
    space = SearchSpace(trace_layers(plain), ["int2", "int4", "e2m1", "int8"])
    model, labels = copy.deepcopy(plain), torch.arange(6) % 5
    batches = [(images(4, seed=1), labels[:4]), (images(2, seed=2), labels[4:])]
    found = loss_delta_scores(model, iter(batches), lambda x: model(x).logits, space)
    scores = found.decision_scores
    assert scores.shape == (len(space.decisions), 4) and (found.images, found.method) == (6, "loss-delta")
    x = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        clean = functional.cross_entropy(plain(x).logits, labels)
        for row, column in ((0, 0), (1, 2), (len(space.decisions) - 1, 1)):
            other = copy.deepcopy(plain)
            layers = space.decisions[row].layers
            switch = make_searchable(other, space.formats, names=layers)
            formats = LayerFormats(space.formats[column], space.formats[column])
            switch.set_allocation(Allocation(dict.fromkeys(layers, formats)))
            expected = functional.cross_entropy(other(x).logits, labels) - clean
            assert torch.isclose(scores[row, column], expected, atol=1e-6)  # sums of losses in another order
    assert all(
        type(module).__module__.startswith("torch") for module in model.modules() if hasattr(module, "in_features")
    )


@pytest.mark.parametrize("name", scores())
def test_all_scores_have_one_call_and_one_record(name: str) -> None:
    """The same arguments, images counted, the model left as it was; two processes that share the images get what one
    gets."""
    model = tiny("vit").train()
    before = copy.deepcopy(model.state_dict())
    space = SearchSpace(trace_layers(model), FORMATS[:3])
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=4))
    pixels = images(4)
    parts = [[(pixels[part], LABELS[:4][part])] for part in (slice(0, 2), slice(2, 4))]
    sums: list[Tensor] = []

    def measure(batches: Any, combine: Any = None) -> Sensitivity:
        again = Repeatable(lambda: iter(batches))
        return find_score(name)(model, again, lambda x: logits_of(model, x), problem, combine=combine)

    whole = measure(parts[0] + parts[1])
    assert (whole.images, whole.decision_scores.dtype) == (4, torch.float32)
    assert (whole.method, whole.passes) == (("fisher", 2) if name == "two-pass" else (name, 1))
    assert whole.decision_scores.shape == (len(space.decisions), 3) and whole.seconds > 0
    assert model.training and all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in ("hessian", "two-pass"):  # probes are drawn per batch; both passes of two: test_two_pass_scores
        return
    measure(parts[1], lambda values: sums.append(values) or values)  # type: ignore[func-returns-value]
    others = iter(sums)
    shared = measure(parts[0], lambda values: values + next(others))
    assert shared.images == 4
    torch.testing.assert_close(shared.decision_scores, whole.decision_scores, rtol=1e-5, atol=1e-7)  # order of sums


def test_two_passes_need_a_target_and_a_score_of_quantized_models() -> None:
    model, space, batches = mlp()
    for choices in (space, SearchProblem(space, CostTable(space.layers, space.formats))):
        with pytest.raises(ConfigError, match="measured at a target"):
            TwoPass()(model, batches, model, choices)
    with pytest.raises(ConfigError, match="'hessian' is measured once"):
        TwoPass(of=hessian_trace_scores)


def test_names_of_scores_are_taken_once() -> None:
    class Other(FormatScore):
        name = "fisher"

        def measure(self, on: ScorePass) -> tuple[Tensor, int]:
            raise NotImplementedError

    with pytest.raises(ConfigError, match="a score 'fisher' already"):
        register_score(Other())
    for name in ("ptq-mine", "two words"):
        Other.name = name
        with pytest.raises(ConfigError, match="name of a score is a word"):
            register_score(Other())
    for name in ("fisher", "mine"):
        with pytest.raises(ConfigError, match="no score that was registered from outside"):
            unregister_score(name)
    with pytest.raises(ConfigError, match="no score 'fisha'; did you mean 'fisher'"):
        find_score("fisha")
