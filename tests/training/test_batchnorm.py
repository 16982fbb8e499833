"""Statistics of batch norms, measured anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import DataError
from fliqs_hf.nn import format_switch, make_searchable, quantizable_layers
from fliqs_hf.training.batchnorm import reestimate_batchnorm, tracking_norms
from tests.helpers.models import images, tiny


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.997), nn.Dropout(0.5), nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
    )  # fmt: skip


def batches() -> list[torch.Tensor]:
    return [images(size, seed) * (1 + seed) for seed, size in enumerate((5, 5, 2))]


def test_statistics_of_the_first_norm_are_those_of_all_images() -> None:
    net = model().train()
    reestimate_batchnorm(net, batches())
    norm: Any = net[1]
    y = net[0](torch.cat(batches())).detach().double()
    mean = y.mean((0, 2, 3))
    # Each batch's own variance has n − 1 below, n being 900 × images: 1 in 1800 at most.
    var = (y.square().mean((0, 2, 3)) - mean * mean) * torch.ones(4)
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1 / 1800 + 1e-5, atol=0)


def test_nothing_else_changes() -> None:
    net = model().train()
    net[2].eval()
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    reestimate_batchnorm(net, batches())
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, state[name])}
    assert changed == {
        f"{n}.{buffer}" for n in (1, 3) for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert [module.training for module in net] == [True, True, False, True, True]
    assert (net[1].momentum, net[3].momentum) == (0.997, 0.1)
    assert torch.equal(torch.get_rng_state(), rng)  # dropout drew nothing
    once = copy.deepcopy(net.state_dict())
    reestimate_batchnorm(net, batches())
    assert all(torch.equal(tensor, once[name]) for name, tensor in net.state_dict().items())


def test_the_momentum_of_mobilenets_forgets_all_but_the_last_batch() -> None:
    """Why: 0.997 is TensorFlow's way of saying 0.003."""
    net: Any = model().train()
    for batch in batches():
        net(batch)
    last = net[0](batches()[-1]).mean((0, 2, 3))
    torch.testing.assert_close(net[1].running_mean, last.detach(), rtol=0.02, atol=0.02)
    assert {norm.momentum for norm in tracking_norms(tiny("mobilenet_v2")).values()} == {0.997}
    assert 0.99 in {norm.momentum for norm in tracking_norms(tiny("efficientnet")).values()}


def test_a_failure_leaves_the_model_as_it_was() -> None:
    net = model().train()
    state = copy.deepcopy(net.state_dict())
    for bad in ([], [batches()[0], torch.zeros(1, 5, 8, 8)]):
        with pytest.raises((DataError, RuntimeError), match=r"no images|channels"):
            reestimate_batchnorm(net, bad)
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        assert net.training and net[1].momentum == 0.997


def test_a_model_without_norms_reads_no_image() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    reestimate_batchnorm(tiny("vit"), never())


def test_the_statistics_are_those_of_the_formats_in_force() -> None:
    net = tiny("resnet")
    switch = make_searchable(net, ["int2", "int8"])
    found = []
    for fmt in ("int2", "int8"):
        switch.set_allocation(Allocation.uniform(switch.names, fmt))
        reestimate_batchnorm(net, [images(8)])
        found.append(copy.deepcopy(net.state_dict()))
        assert format_switch(net) is switch and len(quantizable_layers(net)) == len(switch.names)
    name = "resnet.embedder.embedder.normalization.running_var"
    assert not torch.allclose(found[0][name], found[1][name], rtol=0.01)


def test_a_norm_that_the_pass_does_not_reach_keeps_what_it_knows() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = model(), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    net = Aside().eval()
    net.unused.running_mean.fill_(3.0)  # type: ignore[union-attr]
    net.unused.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    before = copy.deepcopy(net.unused.state_dict())
    reestimate_batchnorm(net, batches())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.unused.state_dict().items())
    assert net.used[1].num_batches_tracked == 3


def test_a_batch_of_one_value_per_channel_is_refused_and_nothing_changes() -> None:
    """As the last norms of a small MobileNet see."""
    net = tiny("mobilenet_v2")
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DataError, match="a batch of 1, of which it sees one value per channel"):
        reestimate_batchnorm(net, [images(3), images(1)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
