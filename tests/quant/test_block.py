"""Formats with scales of their own against gfloat's blocks, `ml_dtypes` and rational arithmetic."""

from __future__ import annotations

from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as gf
from torch import Tensor

from fliqs_hf.errors import FormatError
from fliqs_hf.formats import BlockFormat, parse
from fliqs_hf.formats.block import NAMED, SCALE_BITS
from fliqs_hf.formats.rounding import code_values
from fliqs_hf.quant import IMAGE, ROW, InputQuantizer, WeightQuantizer
from fliqs_hf.quant.block import decode_scales, encode_scales, from_blocks, to_blocks, weight_block_scale

GFLOAT = {
    "mxfp4": gf.format_info_ocp_e2m1,
    "mxfp6_e2m3": gf.format_info_ocp_e2m3,
    "mxfp6_e3m2": gf.format_info_ocp_e3m2,
    "mxfp8_e4m3": gf.format_info_ocp_e4m3,
    "mxfp8_e5m2": gf.format_info_ocp_e5m2,
    "mxint8": gf.format_info_ocp_int8,
}


def block(name: str) -> BlockFormat:
    fmt = parse(name)
    assert isinstance(fmt, BlockFormat)
    return fmt


def cases(fmt: BlockFormat) -> Tensor:
    """Blocks [n, 32]: every code, the midpoint of each two, and their neighbours, at scales far apart; and noise."""
    values = code_values(fmt).double()
    values = values[values.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middle, middle.float().nextafter(torch.tensor(torch.inf)).double(), values * 1.249])
    points = torch.cat([points, points.new_zeros(-len(points) % 31)]).view(-1, 31)
    tops = torch.full((len(points), 1), float(values.max())).double()
    rows = torch.cat([torch.cat([tops * part, points], 1) for part in (1, 0.5, 1.99)])
    noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).double()
    return torch.cat([(rows[:, None] * torch.tensor([2.0**-40, 3.0]).view(-1, 1)).flatten(0, 1), noise])


@pytest.mark.parametrize("name", GFLOAT)
def test_mx_formats_equal_gfloat(name: str) -> None:
    fmt = block(name)
    info = gfloat.block.BlockFormatInfo(name, GFLOAT[name], 32, gf.format_info_ocp_e8m0)
    x = cases(fmt).float()
    if name == "mxint8":  # the code of -2 is left out, as section 5.3.4 allows
        binade = 2.0 ** (torch.frexp(x.abs().amax(1, keepdim=True)).exponent - 1)
        given = x.clamp(min=-binade * 127 / 64)
    else:
        given = x
    expected = np.stack(
        [gfloat.block.quantize_block(info, row, gfloat.block.compute_scale_amax) for row in given.double().numpy()]
    )
    found = WeightQuantizer()(x, fmt)
    assert torch.equal(found.double(), torch.from_numpy(expected) + 0.0)
    assert torch.equal(InputQuantizer(ROW)(x, fmt), found)


@pytest.mark.parametrize("name", sorted({*NAMED, "int4_g32", "int8_g128", "int2_g16"}))
def test_scales_come_back_from_their_bytes(name: str) -> None:
    fmt = block(name)
    torch.manual_seed(0)
    weight = torch.randn(9, 70) * torch.logspace(-6, 6, 9)[:, None]
    weight[3] = 0
    scale, whole = weight_block_scale(weight, fmt, "absmax")
    codes = encode_scales(scale, fmt, whole)
    assert codes.dtype == torch.uint8
    assert codes.numel() == scale.numel() * SCALE_BITS[fmt.scale] // 8
    assert torch.equal(decode_scales(codes, fmt, whole.view(1)), scale.flatten())


def test_mx_scales_are_stored_as_ocp_says() -> None:
    x = torch.tensor([[1.0] + [0.0] * 31])
    for name, exponent in (("mxfp4", -2), ("mxfp8_e4m3", -8), ("mxint8", 0)):
        scale, whole = weight_block_scale(x, block(name), "absmax")
        assert encode_scales(scale, block(name), whole).tolist() == [127 + exponent]


def test_nvfp4_equals_ml_dtypes() -> None:
    torch.manual_seed(0)
    x = (torch.randn(32, 64) * torch.logspace(-5, 3, 32)[:, None]).numpy()
    blocks = x.reshape(32, 4, 16)
    whole = np.abs(x).max() / np.float32(6 * 448)
    scale = (np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / whole).astype(ml_dtypes.float8_e4m3fn)
    scale = np.maximum(scale.astype(np.float32), np.float32(2.0**-9)) * whole
    codes = np.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    expected = torch.from_numpy((codes * scale).reshape(32, 64)) + 0.0
    assert torch.equal(WeightQuantizer()(torch.from_numpy(x), block("nvfp4")), expected)


def nearest(x: float, step: Fraction, low: int, high: int) -> Fraction:
    """The multiple of `step` from low · step to high · step nearest to `x`, ties to even."""
    return min(max(round(Fraction(x) / step), low), high) * step


@pytest.mark.parametrize("name", ["int4_g32", "int8_g64", "int2_g128", "int3_g16"])
def test_integer_groups_equal_rational_arithmetic(name: str) -> None:
    fmt = block(name)
    torch.manual_seed(1)
    x = torch.randn(3, 150) * torch.tensor([1e-20, 1.0, 1e20])[:, None]
    top = int(fmt.max_value)
    found = WeightQuantizer()(x, fmt)
    assert fmt.block is not None
    for row, result in zip(x.tolist(), found.tolist(), strict=True):
        for start in range(0, 150, fmt.block):
            part = np.array(row[start : start + fmt.block], dtype=np.float32)
            scale = np.float32(np.float32(np.abs(part).max() / np.float32(top)).astype(ml_dtypes.bfloat16))
            step = Fraction(float(scale))
            for value, got in zip(part.tolist(), result[start : start + fmt.block], strict=True):
                # x / scale is rounded to float32 before it is rounded to a code
                units = Fraction(float(np.float32(value) / scale))
                expected = min(max(round(units), -top), top) * step
                assert got == float(np.float32(float(expected)))


@pytest.mark.parametrize("name", ["int4_zp", "int8_zp", "int4_g32_zp", "int2_g16_zp"])
def test_zero_points(name: str) -> None:
    """Zero is exact, all of the range is used, and no value is off by more than a step."""
    fmt = block(name)
    torch.manual_seed(0)
    x = torch.nn.functional.gelu(torch.randn(20, 96) * 3)
    found = InputQuantizer(ROW)(x, fmt)
    values, result = to_blocks(x, fmt), to_blocks(found, fmt)
    width = values.amax(-1, keepdim=True).clamp(min=0) - values.amin(-1, keepdim=True).clamp(max=0)
    step = width / fmt.max_value
    # A scale in BF16 is off by 2**-9 at most, which the largest codes multiply.
    assert ((result - values).abs() <= step * (1 + fmt.max_value * 2**-8)).all()
    assert max(len(row.unique()) for row in result.flatten(0, -2)) <= 2**fmt.bits
    assert not InputQuantizer(ROW)(torch.zeros(2, 96), fmt).any()
    symmetric = InputQuantizer(ROW)(x, parse(f"int{fmt.bits}" + (f"_g{fmt.block}" if fmt.block else "")))
    assert (found - x).square().sum() < 0.6 * (symmetric - x).square().sum()


def test_a_zero_point_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.4, 0.5, 1.5, 14.0]])  # scale 1, zero point 1
    assert InputQuantizer(ROW)(x, parse("int4_zp")).tolist() == [[-1.0, 0.0, 0.0, 0.0, 2.0, 14.0]]


@pytest.mark.parametrize("name", [*NAMED, "int4_g32", "int4_zp", "int4_g32_zp"])
def test_special_inputs(name: str) -> None:
    fmt, quantize = block(name), InputQuantizer(ROW)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 64)
        x[0, 3] = value
        found = quantize(x, fmt)
        assert found[0, :16].isnan().all()
        assert torch.equal(found[1:], quantize(x[1:], fmt))
    for value in (0.0, -0.0, 1e-45, 1e-38):
        found = quantize(torch.full((2, 40), value), fmt)
        assert not found.any()
        assert not found.signbit().any()
    assert quantize(torch.full((2, 40), 3e38), fmt).isfinite().all()


def test_what_saturates_has_no_gradient() -> None:
    x = torch.tensor([[7.0, 5.0, *[0.3] * 30]], requires_grad=True)
    InputQuantizer(ROW)(x, block("mxfp4")).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, *[1.0] * 31]]


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4_g32", "int4_g32_zp", "int4_zp"])
def test_results_do_not_depend_on_the_batch(name: str) -> None:
    torch.manual_seed(0)
    images, tokens = torch.randn(4, 40, 5, 5), torch.randn(4, 7, 40)
    for x, kind in ((images, IMAGE), (tokens, ROW)):
        quantize = InputQuantizer(kind)
        assert torch.equal(quantize(x, block(name))[2:3], quantize(x[2:3], block(name)))
    pixel = InputQuantizer(IMAGE)(images, block("mxfp4"))[1, :, 2, 3]
    assert torch.equal(pixel, InputQuantizer(ROW)(images[1, :, 2, 3], block("mxfp4")))


def test_the_last_block_is_shorter() -> None:
    x = torch.randn(3, 70)
    fmt = block("mxfp4")
    assert torch.equal(from_blocks(to_blocks(x, fmt), 70), x)
    assert torch.equal(WeightQuantizer()(x, fmt)[:, 64:], WeightQuantizer()(x[:, 64:], fmt))


@pytest.mark.parametrize("name", [*NAMED, "int4_g32"])
def test_mse_is_never_worse(name: str) -> None:
    torch.manual_seed(0)
    weight, fmt = torch.randn(16, 96), block(name)
    absmax, mse = (
        to_blocks(WeightQuantizer(method=method)(weight, fmt) - weight, fmt).square().sum(-1)
        for method in ("absmax", "mse")
    )
    assert (mse <= absmax * (1 + 1e-6)).all()  # the sums are in another order
    assert mse.sum() < absmax.sum() or fmt.bits == 8  # whose range leaves nothing to gain


def test_names_and_sizes() -> None:
    assert {name: parse(name).effective_bits for name in ("mxfp4", "mxfp6_e3m2", "mxint8", "nvfp4", "int4_g32")} == {
        "mxfp4": 4.25, "mxfp6_e3m2": 6.25, "mxint8": 8.25, "nvfp4": 4.5, "int4_g32": 4.5,
    }  # fmt: skip
    assert parse("INT4-G128").effective_bits == 4.125
    assert parse("int4_g32_zp").effective_bits == 4.625
    assert parse("int4_zp").effective_bits == 4
    assert block("mxfp4").scale_shape((5, 70)) == (5, 3)
    assert block("mxfp4").storage_bytes((5, 70)) == 5 * 70 // 2 + 15
    assert block("nvfp4").storage_bytes((5, 70)) == 175 + 25 + 4
    assert block("int4_g64").storage_bytes((5, 70)) == 175 + 2 * 10
    for name in ("int4_g33", "mxfp5", "int9_zp", "int4_g0", "int1_g32"):
        with pytest.raises(FormatError):
            parse(name)
