"""Which batch norms follow a convolution, and what is left of them once they are folded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import PackedConv2d, QuantizerSettings, pack_model, unpack_model
from fliqs_hf.nn.batchnorm import Folded, convolutions_before, expect_folded, fold_packed, fold_plain, unfold

U = 2.0**-24  # of a rounding to float32


class Net(nn.Module):
    """A convolution and a batch norm of six channels, and `how` they are put together."""

    def __init__(self, how: str = "", conv: nn.Conv2d | None = None, eps: float = 1e-3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm2d(6, eps)  # the order of the modules says nothing
        self.conv = conv or nn.Conv2d(4, 6, 3, bias=False)
        self.other = nn.BatchNorm2d(6)
        self.how = how
        with torch.no_grad():
            for norm in (self.norm, self.other):
                norm.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 1e-3, 30.0, 1.0]))
                norm.bias.normal_()
                norm.running_mean.normal_()  # type: ignore[union-attr]
                norm.running_var.uniform_(0.01, 3)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        if self.how == "relu between":
            return self.norm(functional.relu(y))
        z = self.norm(y)
        if self.how == "residual":
            z = z + y
        if self.how == "view":
            z = z + y.flatten(1).sum()
        if self.how == "two norms":
            z = z + self.other(y)
        if self.how == "norm twice":
            z = self.norm(z)
        if self.how == "conv twice":
            z = z + self.conv(x + 1)
        if self.how == "returned":
            return {"logits": z, "features": [y]}
        return z


def image(seed: int = 1) -> Tensor:
    return torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(seed))


def pairs_of(model: nn.Module) -> Any:
    return convolutions_before(model, {"x": image()})


def packed(model: nn.Module, fmt: str, **settings: Any) -> nn.Module:
    pack_model(model, Allocation.uniform(["conv"], fmt), QuantizerSettings(**settings))
    return model


@pytest.mark.parametrize("training", [False, True])
def test_a_norm_that_alone_reads_a_convolution_is_found(training: bool) -> None:
    model = Net().train(training)
    model.other.train(False)
    before = copy.deepcopy(model.state_dict())
    pairs = pairs_of(model)
    assert pairs.norms == {"conv": "norm"}
    assert pairs.others == {"other": "the model does not call it"}
    assert model.training == model.norm.training == training and not model.other.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.conv._forward_hooks and not model.norm._forward_pre_hooks


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("relu between", "does not directly follow a convolution"),
        ("residual", "not alone in reading what 'conv' gives"),
        ("view", "not alone in reading what 'conv' gives"),
        ("two norms", "not alone in reading what 'conv' gives"),
        ("returned", "not alone in reading what 'conv' gives"),
        ("norm twice", "calls it more than once"),
        ("conv twice", "calls 'conv', which it follows, more than once"),
    ],
)
def test_what_could_not_be_folded_is_no_pair(how: str, reason: str) -> None:
    pairs = pairs_of(Net(how))
    assert not pairs.norms and reason in pairs.others["norm"]


def test_a_model_that_does_not_run_is_named() -> None:
    model = Net()
    with pytest.raises(ConfigError, match=r"of Net is not known.*RuntimeError.*give `inputs`"):
        convolutions_before(model, {"x": torch.zeros(1, 5, 9, 9)})
    assert model.training and not model.conv._forward_hooks


def test_norms_that_are_other_than_they_look() -> None:
    class Own(nn.BatchNorm2d):
        pass

    for norm, reason in (
        (Own(6), "it is a Own, which may do anything"),
        (nn.BatchNorm2d(6, track_running_stats=False), "no running statistics"),
        (nn.BatchNorm2d(6, affine=False), "no weight and bias"),
    ):
        model = Net()
        model.norm = norm
        assert reason in pairs_of(model).others["norm"]


GEOMETRIES: dict[str, Any] = {
    "plain": {},
    "bias": {"bias": True},
    "padded, strided": {"padding": 1, "stride": 2},
    "grouped": {"groups": 2},
}


def conv_of(name: str) -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(4, 6, 3, **{"bias": False, **GEOMETRIES[name]})


def exact(model: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    """What model(x) would be without rounding, and Σ|w·x|·|g|, both float64; packed: of its quantized input."""
    conv, norm = model.conv, copy.deepcopy(model.norm).double()
    weight = conv.weight
    if isinstance(conv, PackedConv2d):
        x = conv.quantized_input(x)
        scale = 1.0 if conv.weight_scale is None else conv.weight_scale.double().view(-1, 1, 1, 1)
        weight = conv.code_values().view(conv.weight_shape).double() * scale
    bias = None if conv.bias is None else conv.bias.double()
    convolve = lambda w, x, b: nn.Conv2d._conv_forward(conv, x, w, b)  # noqa: E731
    weight, x = weight.double().as_subclass(Tensor), x.double()  # type: ignore[union-attr]
    with torch.no_grad():
        size = convolve(weight.abs(), x.abs(), None)
        if isinstance(norm, nn.BatchNorm2d):
            factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs().view(-1, 1, 1)  # type: ignore[operator]
            size = size * factor
        return norm(convolve(weight, x, bias)), size


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("fmt", ["int2", "int4", "int8", "e2m1", "e4m3", "e3m2"])
def test_folding_into_a_packed_convolution(fmt: str, geometry: str) -> None:
    """Within the roundings of scale and bias: the codes are the same, turned where the factor is negative.

    A value is code × scale × g before, and code × fl(scale × g) after: one rounding in exact arithmetic. (The layer
    rounds code × scale as well, before and after.)
    """
    model = packed(Net(conv=conv_of(geometry)).eval(), fmt)
    x = image()
    expected, size = exact(model, x)
    values = model.conv.code_values().view(6, -1)
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    folded, kept = fold_packed(model, pairs_of(model))
    assert folded == {"conv": "norm"} and kept == {"other": "the model does not call it"}
    assert type(model.norm) is Folded and not [*model.norm.parameters(), *model.norm.buffers()]
    assert torch.equal(model.conv.code_values().view(6, -1), values * factor.sign()[:, None])
    found, _ = exact(model, x)
    bias = model.conv.bias.abs().double().view(-1, 1, 1)
    assert ((found - expected).abs() <= 1.001 * U * (size + bias)).all()  # 1.001: U², and float64's own rounding
    # And as it runs, in float32: 4 roundings per product, 36 and 2 sums.
    assert ((model(x) - expected).abs() <= 45 * U * (size + bias)).all()


def test_a_factor_of_zero_leaves_the_bias() -> None:
    model = packed(Net().eval(), "int4")
    fold_packed(model, pairs_of(model))
    assert not model.conv.code_values().view(6, -1)[2].any()
    assert bool((model.conv.weight_scale > 0).all())
    assert torch.equal(model(image())[:, 2], model.conv.bias[2].expand(2, 7, 7))


@pytest.mark.parametrize(("fmt", "settings"), [("bf16", {}), ("int4", {"weight_granularity": "per_tensor"})])
def test_without_a_scale_per_channel_only_a_norm_that_adds_is_folded(fmt: str, settings: dict[str, Any]) -> None:
    model = packed(Net().eval(), fmt, **settings)
    before = model(image())
    folded, kept = fold_packed(model, pairs_of(model))
    assert not folded and kept["norm"] == f"'conv', which it follows, has no scale per output channel in {fmt}"
    assert torch.equal(model(image()), before)

    model = Net().eval()
    fold_plain(model, pairs_of(model))
    packed(model, fmt, **settings)
    before, codes = model(image()), model.conv.weight_codes
    folded, _ = fold_packed(model, pairs_of(model))
    assert folded == {"conv": "norm"} and model.conv.weight_codes is codes
    torch.testing.assert_close(model(image()), before, rtol=1e-6, atol=1e-6)


def test_scales_that_float32_cannot_hold_stay_apart() -> None:
    model = packed(Net().eval(), "int4")
    model.norm.weight.data[0] = 1e-38
    state = copy.deepcopy(model.state_dict())
    folded, kept = fold_packed(model, pairs_of(model))
    assert not folded and "scales beyond float32" in kept["norm"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_convolution_in_floating_point_keeps_its_norm() -> None:
    model = Net().eval()
    folded, kept = fold_packed(model, pairs_of(model))
    assert not folded and kept["norm"] == "'conv', which it follows, is not quantized"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_folding_into_a_plain_convolution(geometry: str) -> None:
    model = Net(conv=conv_of(geometry)).eval()
    keys = list(model.state_dict())
    x = image()
    expected, size = exact(model, x)
    folded, _ = fold_plain(model, pairs_of(model))
    assert folded == {"conv": "norm"} and list(model.state_dict()) == keys
    assert bool((model.norm.running_var + torch.tensor(model.norm.eps) == 1).all())  # so the norm multiplies by 1
    shift = model.norm.bias.abs().double().view(-1, 1, 1)
    assert ((model(x) - expected).abs() <= 40 * U * (size + shift)).all()  # 36 sums, and those of weight and shift
    # The norm's own factor, 1 / √(1 − ε + ε) of float32 numbers, is 1 to 2⁻²⁵: without it, one rounding per weight.
    found = nn.Conv2d._conv_forward(model.conv, x.double(), model.conv.weight.double(), None)
    found = found + model.norm.bias.double().view(-1, 1, 1)
    assert ((found - expected).abs() <= 1.001 * U * (size + shift)).all()
    assert not fold_plain(model, pairs_of(model))[1].get("norm")  # again: nothing changes any more
    assert torch.equal(found, nn.Conv2d._conv_forward(model.conv, x.double(), model.conv.weight.double(), None) + (
        model.norm.bias.double().view(-1, 1, 1)))  # fmt: skip


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.01, 1e-12])
def test_the_variance_of_a_norm_that_only_adds_is_exact(eps: float) -> None:
    model = Net(eps=eps).eval()
    fold_plain(model, pairs_of(model))
    x = torch.randn(3, 6, 4, 4)
    assert torch.equal(model.norm(x), x + model.norm.bias.view(-1, 1, 1))


def test_a_weight_of_two_convolutions_is_not_touched() -> None:
    model = Net()
    model.second = nn.Conv2d(4, 6, 3, bias=False)
    model.second.weight = model.conv.weight
    before = model.conv.weight.clone()
    folded, kept = fold_plain(model, pairs_of(model))
    assert not folded and "its weight is that of 'second.weight' too" in kept["norm"]
    assert torch.equal(model.conv.weight, before)


@pytest.mark.parametrize("geometry", ["plain", "bias"])
def test_unfolding_gives_the_architecture_back(geometry: str) -> None:
    original = Net(conv=conv_of(geometry)).eval()
    model = packed(copy.deepcopy(original), "int4")
    folded, _ = fold_packed(model, pairs_of(model))
    unpack_model(model)
    expected = model(image())
    unfold(model, folded)
    assert list(model.state_dict()) == list(original.state_dict())
    assert type(model.norm) is nn.BatchNorm2d and model.norm.eps == original.norm.eps
    torch.testing.assert_close(model(image()), expected, rtol=1e-6, atol=1e-6)
    original.load_state_dict(model.state_dict())
    assert torch.equal(original(image()), model(image()))


def test_names_that_do_not_fit_are_refused() -> None:
    model = packed(Net(), "int4")
    layers = {"conv": model.conv}
    with pytest.raises(ConfigError, match="'norm' is no packed convolution of Net"):
        expect_folded(model, layers, {"norm": "norm"})
    with pytest.raises(ConfigError, match="'conv' is no BatchNorm2d of 6 channels"):
        expect_folded(model, layers, {"conv": "conv"})
    model.norm = nn.BatchNorm2d(5)
    with pytest.raises(ConfigError, match="'norm' is no BatchNorm2d of 6 channels"):
        expect_folded(model, layers, {"conv": "norm"})
    assert model.conv.bias is None
