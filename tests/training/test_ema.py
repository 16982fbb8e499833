"""The moving average of the weights, against its definition."""

from __future__ import annotations

import torch
from torch import nn

from fliqs_hf.training.ema import WeightAverage


def test_the_average_is_its_definition() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(model, 0.6)
    expected = model.weight.detach().double()
    for update in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update()
        decay = min(0.6, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * model.weight.detach().double()
    trained = model.weight.detach().clone()
    with average.applied():
        assert torch.allclose(model.weight.double(), expected, atol=1e-5)  # float32 against float64
        assert not torch.equal(model.weight, trained)
    assert torch.equal(model.weight, trained)


def test_a_state_continues_bit_for_bit() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    one = WeightAverage(first, 0.9)
    one.update()
    second.load_state_dict(first.state_dict())
    two = WeightAverage(second, 0.9)
    two.load_state_dict({name: tensor.clone() for name, tensor in one.state_dict().items()}, 1)
    for model, average in ((first, one), (second, two)):
        with torch.no_grad():
            model.weight.mul_(3)
        average.update()
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())
