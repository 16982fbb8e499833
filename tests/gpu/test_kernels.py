"""On a GPU: packed layers by their kernels, to the bound that those of CPUs keep, and whole models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.nn.kernels import kernels_of, set_kernels
from fliqs_hf.nn.native import codes, cuda
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.swap import packed_layers
from tests.helpers.kernels import exact, packed, some
from tests.helpers.models import images, tiny

pytestmark = pytest.mark.gpu

CODABLE = [fmt for fmt in COMMON if codes.int8_shift(fmt) is not None]
IN_E4M3 = [fmt for fmt in COMMON if cuda.fits_e4m3(fmt)]
GRANULARITIES = ("per_token", "per_tensor", "per_token_clipped", "static")


def run(layer: PackedLayer, x: Tensor, kernel: str = "int8") -> Tensor:
    device = copy.deepcopy(layer).cuda()
    assert device.kernel.kernel == kernel, device.kernel
    with torch.no_grad():
        return device(x.cuda()).cpu()


def assert_exact(layer: PackedLayer, x: Tensor) -> None:
    expected, bound = exact(layer, x)
    for layer.weight_cache in ("decoded", "none"):  # codes of a byte each, or unpacked by the product
        found = run(layer, x)
        assert found.shape == expected.shape
        assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("weight", CODABLE, ids=str)
@pytest.mark.parametrize("activation", [*CODABLE, parse("int4_zp"), parse("int7_zp")], ids=str)
def test_every_pair_of_integers_is_exact(weight: Any, activation: Any) -> None:
    assert_exact(packed(nn.Linear(72, 136), weight.name, activation.name), some(50, 72))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 192), (200, 192), (2, 197, 192), (192,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_granularities(granularity: str, shape: tuple[int, ...], bias: bool) -> None:
    layer = packed(nn.Linear(192, 576, bias=bias), "int4", "int8", granularity)
    assert_exact(layer, some(*shape))
    assert_exact(layer, some(*shape[:-1], 384)[..., ::2])  # not contiguous


def test_patch_embeddings() -> None:
    for activation in ("int8", "int4_zp"):
        assert_exact(packed(nn.Conv2d(3, 12, 4, stride=4), "int6", activation), some(3, 3, 12, 8))


@pytest.mark.parametrize("weight", IN_E4M3, ids=str)
@pytest.mark.parametrize("activation", [fmt for fmt in IN_E4M3 if codes.int8_shift(fmt) is None], ids=str)
def test_products_of_e4m3_are_summed_to_a_part_in_4096(weight: Any, activation: Any) -> None:
    """FP8 units keep at least 13 bits of the largest product of a block; 12 leave room for how sums are cut."""
    layer, x = packed(nn.Linear(1536, 144), weight.name, activation.name), some(50, 1536)
    expected = layer.reference(x).double()
    quantized, decoded = layer.quantized(x)
    largest = quantized.double().abs() @ decoded.double().abs().T
    for layer.weight_cache in ("decoded", "none"):
        assert bool(((run(layer, x, "fp8").double() - expected).abs() <= largest * 2**-12).all())
    rounding = 2.0**-8
    layer.weight_cache = "decoded"  # by torch's own product, which gives bfloat16
    found = run(copy.deepcopy(layer).bfloat16(), x.bfloat16(), "fp8").double()
    expected = layer.reference(x.bfloat16().float()).double()
    assert bool(((found - expected).abs() <= largest * 2**-12 + expected.abs() * 2 * rounding + rounding).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    layer, x = packed(nn.Linear(16, 8), "int4", "int8"), some(4, 16).to(dtype)
    assert torch.equal(run(layer, x), run(layer, x.float()).to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("formats", [("int4", "int8"), ("int4", "int4_zp"), ("e4m3", "e4m3")], ids=str)
def test_what_is_not_finite_shows_in_its_row_only(bad: float, formats: tuple[str, str]) -> None:
    layer, x = packed(nn.Linear(16, 8), *formats), some(4, 16)
    x[2, 5] = bad
    found = run(layer, x, "fp8" if "e4m3" in formats else "int8")
    assert found[2].isnan().all() and found[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("pair", [("int8", "int8"), ("int4", "int4_zp"), ("e2m1", "int8"), ("e4m3", "e4m3")], ids=str)
def test_models_answer_as_by_the_reference_path(pair: tuple[str, str]) -> None:
    """A flipped rounding propagates, so not to the bit: far closer than quantization itself moves them."""
    plain = tiny("vit")
    formats = FLIQSConfig(weight_format=pair[0], activation_format=pair[1])
    model = fliqs_hf.quantize(copy.deepcopy(plain), formats).cuda().eval()
    x = images(64).cuda()
    with torch.inference_mode():
        found, moved = model(x).logits, plain.cuda().eval()(x).logits
        kernels = {name: choice.kernel for name, choice in kernels_of(model).items()}
        assert kernels.pop("classifier") in ("int8", "fp8", "decoded")  # its 5 rows need not end with a byte
        assert set(kernels.values()) <= {"int8", "fp8"}
        compiled = torch.compile(model, dynamic=False)(x).logits
        set_kernels(model, "reference")
        expected = model(x).logits
    error = (moved - expected).square().mean().sqrt()
    assert (found - expected).square().mean().sqrt() < error / 2
    assert (compiled - expected).square().mean().sqrt() < error / 2


def test_a_compiled_model_calls_the_kernels() -> None:
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4", activation_format="int8")).cuda().eval()
    assert [name for name, layer in packed_layers(model).items() if layer._compiled is None] == ["classifier"]
    with torch.no_grad():
        torch.compile(model, fullgraph=True, dynamic=False)(images(2).cuda())
