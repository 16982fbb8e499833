"""What GPTQ leaves of the error of rounding to nearest, against outputs that are computed here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf.formats import parse
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.ptq import gain as gain_module
from fliqs_hf.ptq import gptq_round, input_hessian, rounding_gain
from fliqs_hf.quant import WeightQuantizer
from tests.helpers.models import tiny


class Two(nn.Module):
    """Two layers, of which images reach one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read = nn.Linear(64, 24)
        self.unread = nn.Linear(64, 24)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.read(images.flatten(1))
        return out


def images_of(rows: Tensor) -> Tensor:
    return rows.view(len(rows), 1, 8, 8)


def gain(model: nn.Module, rows: Tensor, **options: Any) -> dict[str, float]:
    return rounding_gain(model, {"read": model.read, "unread": model.unread}, images_of(rows), **options)


@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_it_is_the_ratio_of_the_errors_of_outputs(method: Any) -> None:
    model, mixing = Two().eval(), torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(2)) @ mixing
    quantizer = WeightQuantizer(method=method)
    found = gain(model, rows, quantizer=quantizer)
    weight, fmt = model.read.weight.detach(), parse("int4")
    scale, _ = quantizer.scale(weight, fmt)
    best = gptq_round(weight, scale, fmt, input_hessian(model.read, rows))
    nearest = quantizer(weight, fmt)
    outputs = [(rows.double() @ (one - weight).double().T).square().sum() for one in (best, nearest)]
    # Hessians are summed in float32: 1e-5 of their values.
    assert found["read"] == pytest.approx(float(outputs[0] / outputs[1]), rel=1e-3)
    assert found["read"] < 0.6  # correlated inputs are what GPTQ lives on
    assert found["unread"] == 1.0


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2", "swin"])
def test_batches_are_no_larger_than_what_fits_and_their_hessians_add_up(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all images at once, however few fit and however few Hessians there is room for."""
    model, given = tiny(name).eval(), torch.randn(37, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    layers = quantizable_layers(model)

    def found(most: int, batch: int, most_bytes: int) -> tuple[dict[str, Tensor], list[int]]:
        sizes: list[int] = []
        hessians: dict[str, Tensor] = {}

        def ratio(layer: nn.Module, hessian: Tensor, *_: Any) -> float:
            hessians[next(key for key, one in layers.items() if one is layer)] = hessian
            return 1.0

        monkeypatch.setattr(gain_module, "BATCH", batch)
        monkeypatch.setattr(gain_module, "fitting_images", lambda *_: 2 * most)
        monkeypatch.setattr(gain_module, "room", lambda _: 2 * most_bytes)
        monkeypatch.setattr(gain_module, "_ratio", ratio)
        handle = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        rounding_gain(model, layers, given)
        handle.remove()
        return hessians, sizes

    whole, sizes = found(1000, 1000, 2**40)
    assert sizes == [37] and list(whole) == list(layers)
    for most, batch, most_bytes, expected in (
        (10, 32, 2**40, [10, 10, 10, 7]),
        (1000, 16, 2**40, [16, 16, 5]),
        (0, 32, 2**40, [1] * 37),  # not even one fits: then one at a time
        (20, 32, 0, [20, 17] * len(layers)),
    ):
        parts, sizes = found(most, batch, most_bytes)
        assert sizes == expected and list(parts) == list(whole)
        for name, hessian in parts.items():
            # Products of a batch are summed in float32, and inputs differ as products of other batch sizes do.
            torch.testing.assert_close(hessian, whole[name], rtol=0, atol=1e-5 * float(whole[name].abs().max()))


def test_hessians_are_grouped_by_their_size() -> None:
    layers = {"a": nn.Linear(8, 4), "b": nn.Conv2d(6, 6, 3, groups=6), "c": nn.Linear(16, 1), "d": nn.Linear(8, 9)}
    sizes = {"a": 8 * 8**2, "b": 8 * 6 * 9**2, "c": 8 * 16**2, "d": 8 * 8**2}

    def groups(most: int) -> list[list[str]]:
        return [list(group) for group in gain_module._groups(layers, most)]

    assert groups(sum(sizes.values())) == [["a", "b", "c", "d"]]
    assert groups(sum(sizes.values()) - 1) == [["a", "b", "c"], ["d"]]
    assert groups(sizes["a"] + sizes["b"] - 1) == [["a"], ["b"], ["c", "d"]]
    assert groups(0) == [["a"], ["b"], ["c"], ["d"]]


def test_nothing_is_gained_on_inputs_without_correlation() -> None:
    assert gain(Two().eval(), torch.eye(64))["read"] == 1.0  # GPTQ rounds to nearest then, bit for bit


def test_a_layer_without_an_error_or_an_inverse_stays_as_scored() -> None:
    model = Two().eval()
    with torch.no_grad():
        model.read.weight.zero_()
    assert gain(model, torch.eye(64))["read"] == 1.0
    row = torch.full((9, 64), 1e-3)
    assert gain(Two().eval(), row, damping=1e-30)["read"] == 1.0  # of rank one


@pytest.mark.parametrize("name", ["vit", "mobilenet_v2", "swin"])
def test_every_layer_of_a_model_has_one_and_the_model_stays(name: str) -> None:
    model = tiny(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layers = quantizable_layers(model)
    found = rounding_gain(model, layers, torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert list(found) == list(layers) and all(0 < ratio <= 1.5 for ratio in found.values())
    assert sum(found.values()) < 0.9 * len(found)
    assert model.training and not any(layer._forward_hooks for layer in layers.values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
