"""Errors of codes against exact rounding."""

from __future__ import annotations

import pytest
import torch

from fliqs_hf.formats import parse, round_to_format
from fliqs_hf.quant.residual import code_errors


@pytest.mark.parametrize("name", ["int2", "int3", "int8", "int16", "e2m0", "e2m1", "e3m2", "e4m3", "e5m10", "bf16"])
def test_errors_of_codes(name: str) -> None:
    fmt = parse(name)
    z = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z[:3] = torch.tensor([1.0, -1.0, 0.0])
    y = z.double() * (fmt.max_value if fmt.is_scaled else 1)
    exact = round_to_format(y.float(), fmt).double() - y
    found = code_errors(z, fmt, torch.empty_like(z), torch.empty_like(z, dtype=torch.int32))
    # y and the subtraction are float32: off by half a unit in the last place of y, each
    off = 2.0**-23 * y.abs() + 1e-12
    assert bool(((found - exact).abs() <= off).all())
