"""`fliqs_hf.estimate` against counting by hand, and what it refuses."""

from __future__ import annotations

import pytest

import fliqs_hf
from fliqs_hf import Allocation
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import AllocationError, ConfigError, FormatError
from tests.helpers.models import tiny


def test_costs_are_those_of_the_formats() -> None:
    model = tiny("vit")
    layers = trace_layers(model)
    macs = sum(layer.macs for layer in layers)
    found = fliqs_hf.estimate(model, "int4")
    assert (found["macs"], found["bops"], found["fp32_bops"]) == (macs, 16 * macs, 1024 * macs)
    assert found["fp32_bytes"] == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    first = Allocation.uniform([layers[0].name], "int8")
    assert fliqs_hf.estimate(model, first)["bops"] == 64 * layers[0].macs + 1024 * (macs - layers[0].macs)


def test_what_has_no_estimate_is_refused() -> None:
    model = tiny("vit")
    with pytest.raises(FormatError, match="int99"):
        fliqs_hf.estimate(model, "int99")
    with pytest.raises(AllocationError, match="'nose'"):
        fliqs_hf.estimate(model, Allocation.uniform(["nose"], "int8"))
    with pytest.raises(ConfigError, match="packed"):
        fliqs_hf.estimate(fliqs_hf.quantize(model, fliqs_hf.FLIQSConfig()), "int8")
