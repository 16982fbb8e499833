"""CUDA kernels, run on the CPU by Triton's interpreter: the codes and sums of the kernels for CPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf.formats import COMMON, decode, encode, parse
from fliqs_hf.nn.native import codes, cuda
from fliqs_hf.nn.packed import PackedLayer
from tests.helpers.kernels import UNIT, exact, packed, some

CODABLE = [fmt for fmt in COMMON if codes.int8_shift(fmt) is not None]
IN_E4M3 = [fmt for fmt in COMMON if cuda.fits_e4m3(fmt)]
GRANULARITIES = ("per_token", "per_tensor", "per_token_clipped", "static")


pytest.importorskip("triton", reason="Triton has no package for this platform")
if torch.cuda.is_available():
    pytest.skip("Triton compiles for the device here: see tests/gpu", allow_module_level=True)

from fliqs_hf.nn.native import triton_kernels  # noqa: E402 - needs Triton


def run(layer: PackedLayer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return cuda.CudaProduct(layer)(layer, x)


def assert_exact(layer: PackedLayer, x: Tensor) -> None:
    expected, bound = exact(layer, x)
    for cache in ("decoded", "none"):  # codes of a byte each, or unpacked by the product
        layer.weight_cache = cache
        found = run(layer, x)
        assert found.shape == expected.shape
        assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("activation", [*CODABLE, parse("int4_zp"), parse("int7_zp")], ids=str)
def test_codes_and_scales_are_those_of_the_cpu(activation: Any) -> None:
    layer = packed(nn.Linear(97, 8), "int8", activation.name)
    x = some(50, 97) * torch.logspace(-30, 30, 50)[:, None]
    x[3], x[4], x[5] = 0, x[4].abs(), -x[5].abs()
    expected, scale = codes.quantized_codes(layer, x)
    found, scales = triton_kernels.quantize(
        x, activation, 2.0 ** (codes.int8_shift(activation) or 0), None, torch.int8
    )
    assert torch.equal(found, (expected.int() - codes.ZERO_POINT).to(torch.int8))
    assert torch.equal(scales, scale.flatten())


@pytest.mark.parametrize("fmt", [fmt for fmt in COMMON if fmt.bits <= 8], ids=str)
def test_e4m3_holds_what_its_values_say(fmt: Any) -> None:
    values = decode(torch.arange(2**fmt.bits, dtype=torch.uint8), fmt, check=False)
    values = values[values.abs() <= fmt.max_value]
    e4m3 = parse("e4m3")
    assert cuda.fits_e4m3(fmt) == torch.equal(decode(encode(values, e4m3), e4m3), values)


@pytest.mark.parametrize("activation", IN_E4M3, ids=str)
def test_codes_of_e4m3_are_the_quantized_input(activation: Any) -> None:
    layer, x = packed(nn.Linear(97, 8), "e4m3", activation.name), some(50, 97)
    found, scales = triton_kernels.quantize(x, activation, 1.0, None, torch.float8_e4m3fn)
    assert torch.equal(found.float() * scales[:, None], layer.quantized_input(x))


@pytest.mark.parametrize("weight", CODABLE, ids=str)
@pytest.mark.parametrize("activation", ["int8", "e2m3", "int4_zp"])
def test_weights_of_every_width_are_unpacked(weight: Any, activation: str) -> None:
    assert_exact(packed(nn.Linear(72, 136), weight.name, activation), some(5, 72))


@pytest.mark.parametrize("weight", IN_E4M3, ids=str)
def test_products_of_e4m3(weight: Any) -> None:
    """Sums of float32, as the interpreter has them: a device's FP8 units have fewer bits."""
    layer, x = packed(nn.Linear(72, 16), weight.name, "e4m3"), some(5, 72)
    quantized, decoded = layer.quantized(x)
    bound = (72 + 3) * UNIT * (quantized.abs() @ decoded.abs().T + 1)  # a rounding for each sum, scale and bias
    for layer.weight_cache in ("decoded", "none"):
        assert bool(((run(layer, x) - layer.reference(x)).abs() <= 2 * bound).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 48), (48,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_granularities(granularity: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = packed(nn.Linear(48, 20, bias=bias), "int4", "int8", granularity)
    assert_exact(layer, some(*shape))
    assert_exact(layer, some(*shape[:-1], 96)[..., ::2])  # not contiguous


def test_patch_embeddings() -> None:
    assert_exact(packed(nn.Conv2d(3, 12, 4, stride=4), "int6", "int8"), some(3, 3, 12, 8))
    assert_exact(packed(nn.Conv2d(3, 12, 4, stride=4), "int4", "int4_zp"), some(3, 3, 12, 8))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row_only(bad: float) -> None:
    for activation in ("int8", "int4_zp", "e2m1"):
        layer, x = packed(nn.Linear(16, 8), "int4", activation), some(4, 16)
        x[2, 5] = bad
        found = run(layer, x)
        assert found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()


def test_other_dtypes_come_out_as_they_went_in() -> None:
    layer, x = packed(nn.Linear(16, 8), "int4", "int8"), some(4, 16)
    assert torch.equal(run(layer, x.half()), run(layer, x.half().float()).half())
    found, expected = run(layer, x.bfloat16()), run(layer, x.bfloat16().float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)  # the interpreter cuts bits off


@pytest.mark.parametrize(("layer", "formats", "reason"), [
    (nn.Linear(8, 8), ("e5m2", "int8"), "weights in e5m2 are neither"),
    (nn.Linear(8, 8), ("e2m1", "e5m2"), "inputs in e5m2 are neither"),
    (nn.Linear(8, 8), ("int8", "e4m3"), "weights in int8 are neither"),
    (nn.Linear(8, 8), ("int8", None), "not quantized"),
    (nn.Linear(8, 9), ("int4", "int8"), "9 rows of 4 bits"),
    (nn.Linear(8, 12), ("int7", "int8"), "12 rows of 7 bits"),
    (nn.Conv2d(3, 4, 3, padding=1), ("int4", "int8"), "overlap or are padded"),
])  # fmt: skip
def test_what_keeps_a_layer_from_a_product_is_said(
    layer: nn.Module, formats: tuple[str, str | None], reason: str
) -> None:
    assert reason in cuda.obstacle(packed(layer, *formats))


def test_a_device_without_fp8_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed(nn.Linear(8, 8), "e4m3", "e4m3")
    monkeypatch.setattr(cuda, "_capability", lambda device: (8, 0))
    assert cuda.obstacle(layer) == "this device has no products of E4M3"
    monkeypatch.setattr(cuda, "_capability", lambda device: (8, 9))
    assert cuda.obstacle(layer) == ""


def test_without_triton_the_reference_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    assert "Triton" in cuda.obstacle(packed(nn.Linear(8, 8), "int4", "int8"))
