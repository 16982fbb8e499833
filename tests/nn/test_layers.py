"""Searchable and packed layers: geometry, switching, sharing, gradients, copies, casts."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.errors import AllocationError, CheckpointError, ConfigError
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.nn import (
    PackedLinear,
    QuantizerSettings,
    format_switch,
    make_searchable,
    pack_model,
    packed_layers,
    quantizable_layers,
    restore,
    unpack_model,
)
from fliqs_hf.nn.kernels import set_kernels
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.searchable import CLIP_RATE
from fliqs_hf.quant import IMAGE, ROW, InputQuantizer, quantize_activation, quantize_weight
from fliqs_hf.quant.scale import CALIBRATED, ScaleMethod, WeightGranularity
from tests.helpers.models import images, tiny

CONVOLUTIONS = {
    "plain": nn.Conv2d(4, 6, 3),
    "stride": nn.Conv2d(4, 6, 4, stride=4),
    "stride pair": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)),
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "dilation": nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "reflect": nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="circular"),
}


def one(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(copy.deepcopy(layer))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_geometry(name: str) -> None:
    x = torch.randn(2, 4, 12, 12)
    model, plain = one(CONVOLUTIONS[name]), CONVOLUTIONS[name]
    make_searchable(model, ["e2m1"])
    conv = copy.deepcopy(plain)
    conv.weight.data = quantize_weight(plain.weight.data, parse("e2m1"))
    expected = conv(quantize_activation(x, parse("e2m1"), IMAGE))
    assert torch.equal(model(x), expected)
    pack_model(model, Allocation.uniform(["0"], "e2m1"))
    assert torch.equal(model(x), expected)
    for attribute in ("stride", "padding", "dilation", "groups", "kernel_size", "in_channels", "out_channels"):
        assert getattr(model[0], attribute) == getattr(plain, attribute)
    unpack_model(model)
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(model(x), conv(x))


@pytest.mark.parametrize(
    "settings",
    list(itertools.product(WeightGranularity.__args__, ScaleMethod.__args__, ("per_token", "per_tensor"))),  # type: ignore[attr-defined]
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_searchable_in_every_format(settings: tuple[str, str, str], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(17, 9).to(dtype), torch.randn(2, 5, 17).to(dtype)
    searchable = one(linear)
    switch = make_searchable(searchable, COMMON, settings=QuantizerSettings(*settings))  # type: ignore[arg-type]
    for weight, activation in zip(COMMON, [None, *COMMON], strict=False):
        allocation = Allocation({"0": LayerFormats(weight, activation)})
        switch.set_allocation(allocation)
        packed = one(linear)
        pack_model(packed, allocation, QuantizerSettings(*settings))  # type: ignore[arg-type]
        assert torch.equal(packed(x), searchable(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_learned_clipping_factor_is_packed(kind: str, dtype: torch.dtype) -> None:
    """In every format; formats that are used unscaled have none."""
    torch.manual_seed(0)
    layer = (nn.Linear(17, 9) if kind == "linear" else nn.Conv2d(3, 4, 2)).to(dtype)
    x = (torch.randn(2, 5, 17) if kind == "linear" else torch.randn(2, 3, 6, 6)).to(dtype)
    settings, searchable = QuantizerSettings(activation_granularity="per_token_clipped"), one(layer)
    switch = make_searchable(searchable, COMMON, settings=settings)
    searchable[0].input_clip.data.fill_(math.log(0.7) / CLIP_RATE)
    for fmt in COMMON:
        allocation = Allocation.uniform(["0"], fmt)
        switch.set_allocation(allocation)
        packed = copy.deepcopy(searchable)
        pack_model(packed, allocation, settings)
        assert torch.equal(packed(x), searchable(x))
        quantized, _ = packed[0].quantized(x)
        clipped = quantized.abs().amax() / x.abs().amax()  # of the token, or image, with the largest value
        assert clipped.item() == pytest.approx(0.7 if fmt.is_scaled else 1, rel=0.01)  # bfloat16 has 8 bits
    with pytest.raises(ConfigError, match="pack it with 'per_token_clipped'"):
        pack_model(searchable, allocation)
    restore(searchable)
    assert [name for name, _ in searchable.named_parameters()] == ["0.weight", "0.bias"]


def test_clipping_factors_learn_to_clip() -> None:
    """An outlier costs the other values of its token their precision, at 2 bits all of it."""
    torch.manual_seed(0)
    model, x = one(nn.Linear(32, 8)), torch.randn(64, 32)
    x[:, 0] *= 20
    with torch.no_grad():
        model[0].weight[:, 0] = 0
    expected = model(x).detach()
    settings = QuantizerSettings(activation_granularity="per_token_clipped")
    make_searchable(model, ["int8", "int3"], settings=settings).set_allocation(
        Allocation({"0": LayerFormats.of("int8", "int3")})
    )
    first = functional.mse_loss(model(x), expected).item()
    optimizer = torch.optim.Adam([model[0].input_clip], lr=2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        functional.mse_loss(model(x), expected).backward()
        optimizer.step()
    assert model[0].clip_factor().item() < 0.5
    assert functional.mse_loss(model(x), expected).item() < first / 2


def test_clipping_factors_are_each_layers_own() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)})
    settings = QuantizerSettings(activation_granularity="per_token_clipped")
    make_searchable(model, ["int4"], input_groups={"q": 0, "k": 0}, settings=settings)
    x = torch.randn(3, 8)
    with torch.no_grad():
        model["k"].input_clip.fill_(-0.02)
        before = model["q"](x)
        model["k"](x)
        assert torch.equal(model["q"](x), before)
        twin = copy.deepcopy(model["q"])
        twin.weight.copy_(model["k"].weight)
        twin.bias.copy_(model["k"].bias)
        assert not torch.equal(model["k"](x), twin(x))


def test_formats_switch_without_touching_modules_or_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    before = dict(model.named_parameters())
    plain_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    switch = make_searchable(model, ["int2", "e4m3", "int8"])
    x = torch.randn(4, 8)
    results = []
    for first, second in itertools.product(range(3), repeat=2):
        index = torch.tensor([first, second])
        switch.set(index, index.flip(0))
        w = [quantize_weight(model[i].weight, switch.formats[j]) for i, j in ((0, first), (2, second))]
        a = quantize_activation(x, switch.formats[second], ROW)
        hidden = functional.linear(a, w[0], model[0].bias).relu()
        expected = functional.linear(quantize_activation(hidden, switch.formats[first], ROW), w[1], model[2].bias)
        assert torch.equal(model(x), expected)
        results.append(expected)
    assert len({tuple(result.flatten().tolist()) for result in results}) == 9
    assert all(after is before[name] for name, after in model.named_parameters())
    assert list(model.modules()) == modules and list(model.state_dict()) == list(plain_state)
    restore(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(tensor, plain_state[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="not searchable"):
        format_switch(model)


class Attention(nn.Module):
    """Three layers that read one tensor, and one that reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(self.q(x) * self.k(x) + self.v(x))


def test_layers_that_read_one_tensor_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = InputQuantizer.__call__
    monkeypatch.setattr(InputQuantizer, "__call__", lambda *args: calls.append(1) or original(*args))
    torch.manual_seed(0)
    apart = Attention()
    together = copy.deepcopy(apart)
    make_searchable(apart, ["int4"])
    make_searchable(together, ["int4"], input_groups={"q": 0, "k": 0, "v": 0, "o": 1})
    x = torch.randn(2, 6)
    for model, expected_calls in ((apart, 4), (together, 2)):
        calls.clear()
        model(x).sum().backward()
        assert len(calls) == expected_calls
    for name, parameter in apart.named_parameters():
        assert torch.equal(parameter.grad, together.get_parameter(name).grad)
    wide = copy.deepcopy(together)
    restore(wide)
    switch = make_searchable(wide, ["int4", "int8"], input_groups={"q": 0, "k": 0})
    with pytest.raises(AllocationError, match="'q' and 'k' read the same tensor"):
        switch.set_allocation(Allocation({"q": LayerFormats.of("int4", "int4"), "k": LayerFormats.of("int4", "int8")}))
    # nothing is held after the last reader, and a changed tensor is quantized anew
    assert together.q.shared_input._value is None
    first = together(x)
    with torch.no_grad():
        x.mul_(1.5)
    assert not torch.equal(together(x), first)
    assert torch.equal(together(x), apart(x))


def test_shared_inputs_in_inference_mode() -> None:
    """Tensors made there have no version, so a change in place would go unnoticed if they were shared."""
    torch.manual_seed(0)
    apart = Attention()
    together = copy.deepcopy(apart)
    make_searchable(apart, ["int4"])
    make_searchable(together, ["int4"], input_groups={"q": 0, "k": 0, "v": 0})
    with torch.inference_mode():
        x = torch.randn(2, 6)
        assert torch.equal(together(x), apart(x))
        x.mul_(1.5)
        assert torch.equal(together(x), apart(x))


def test_layers_of_one_group_are_given_one_format() -> None:
    switch = make_searchable(Attention(), ["int4", "int8"], input_groups={"q": 0, "k": 0, "v": 0})
    switch.set(torch.tensor([0, 1, 0, 1]), torch.tensor([1, 1, 1, 0]))
    with pytest.raises(AllocationError, match=r"'q' and 'v' read the same tensor.*int8 and int4"):
        switch.set(torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 0, 0]))


def test_copies_have_their_own_switch() -> None:
    model = one(nn.Linear(5, 5))
    switch = make_searchable(model, ["int2", "int8"])
    x = torch.randn(3, 5)
    first = model(x)
    other = copy.deepcopy(model)
    switch.set(torch.tensor([1]), torch.tensor([1]))
    assert torch.equal(other(x), first)
    assert not torch.equal(model(x), first)


def test_disabled_is_the_plain_layer() -> None:
    plain = nn.Linear(5, 5)
    model, x = one(plain), torch.randn(3, 5)
    switch = make_searchable(model, ["int2"])
    with switch.disabled():
        assert torch.equal(model(x), plain(x))
    assert not torch.equal(model(x), plain(x))


def test_scales_stay_float32_through_casts_and_moves() -> None:
    model = one(nn.Linear(5, 4))
    pack_model(model, Allocation.uniform(["0"], "int4", None))
    scale = model[0].weight_scale.clone()
    weight = model[0].weight
    model.to(torch.bfloat16)
    assert model[0].weight.dtype is model[0].bias.dtype is torch.bfloat16
    assert torch.equal(model[0].weight_scale, scale)
    model.float()
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(3, 4, 2), nn.ConvTranspose2d(4, 6, 2)], ids=str)
def test_a_weight_is_decoded_when_its_values_are_read(layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models ask weights for their dtype in every pass."""
    model = one(layer).to(torch.bfloat16)
    shape = layer.weight.shape
    pack_model(model, Allocation.uniform(["0"], "int4"))
    decoded = model[0].kind.parameter(model[0], model[0].decoded_weight()).to(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(type(model[0]), "decoded_weight", lambda self: pytest.fail("decoded"))
        weight = model[0].weight
        assert (weight.dtype, weight.shape, weight.device) == (torch.bfloat16, shape, torch.device("cpu"))
        assert (weight.size(0), weight.dim(), weight.numel()) == (shape[0], len(shape), shape.numel())
        assert not weight.requires_grad and weight.is_floating_point()
    assert torch.equal(weight, decoded) and torch.equal(weight[1:].float() * 2, decoded[1:].float() * 2)
    assert weight.tolist() == decoded.tolist() and weight.norm() == decoded.norm()
    assert torch.equal(weight.clone(), decoded) and "DecodedWeight(" in repr(weight)


@pytest.mark.parametrize("architecture", ["vit", "deit", "beit", "swin"])
def test_a_pass_decodes_no_weight_that_is_kept(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(architecture)
    pack_model(model, Allocation.uniform(quantizable_layers(model), "int4"))
    set_kernels(model)
    with torch.no_grad():
        model(images(1))
        monkeypatch.setattr(PackedLayer, "code_values", lambda self: pytest.fail("decoded"))
        model(images(1))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("buffer", ["weight_scale", "input_scale"])
def test_scales_that_are_no_positive_numbers_are_damage(buffer: str, value: float) -> None:
    settings = QuantizerSettings(activation_granularity="per_token_clipped")
    packed = PackedLinear(torch.Size([4, 4]), LayerFormats.of("int4", "int4"), settings, None)
    packed.input_scale.fill_(1)
    packed.check_codes("head")
    getattr(packed, buffer)[0] = value
    with pytest.raises(CheckpointError, match=rf"head\.{buffer} holds a value that is no positive number"):
        packed.check_codes("head")


def test_only_exact_types_are_quantized() -> None:
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": Special(2, 2), "c": nn.Conv3d(2, 2, 1), "d": nn.Conv2d(2, 2, 1)})
    assert list(quantizable_layers(model)) == ["a", "d"]


def test_errors_name_the_layer() -> None:
    model = one(nn.Linear(2, 2))
    with pytest.raises(AllocationError, match="'7'"):
        make_searchable(model, ["int4"], names=["7"])
    with pytest.raises(AllocationError, match="'1'"):
        pack_model(model, Allocation.uniform(["0", "1"], "int4"))
    assert not packed_layers(model)
    switch = make_searchable(model, ["int4"])
    with pytest.raises(ConfigError, match="searchable already"):
        make_searchable(model, ["int4"])
    with pytest.raises(AllocationError, match=r"'0'.*int5"):
        switch.set_allocation(Allocation.uniform(["0"], "int5"))


@pytest.mark.parametrize("granularity", CALIBRATED)
def test_input_scales_of_a_layer_need_calibration(granularity: Any) -> None:
    settings = QuantizerSettings(activation_granularity=granularity)
    model = one(nn.Linear(4, 4))
    turns = [lambda: pack_model(model, Allocation.uniform(["0"], "int4"), settings)]
    if granularity == "static":  # clipping factors can be learned
        turns.append(lambda: make_searchable(model, ["int4"], settings=settings))
    for turn in turns:
        with pytest.raises(ConfigError, match=r"fliqs_hf\.ptq\.calibrate"):
            turn()
        assert type(model[0]) is nn.Linear
    # Until it has a scale, a layer gives NaN rather than the results of a scale that nobody chose.
    packed = PackedLinear(torch.Size([4, 4]), LayerFormats.of("int4", "int4"), settings, None)
    assert packed(torch.ones(1, 4)).isnan().all()
