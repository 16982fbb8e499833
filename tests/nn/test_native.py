"""Native kernels: layers are exact to the bound that `nn/native` derives, and nothing stale is ever used."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf import Allocation
from fliqs_hf.formats import COMMON, code_values, parse
from fliqs_hf.nn import pack_model
from fliqs_hf.nn.kernels import set_kernels
from fliqs_hf.nn.native import choice, codes, int8
from tests.helpers.kernels import WAYS, assert_exact, choose_way, packed, some

ROOT = Path(__file__).parents[2]
WEIGHT = "int7"  # the widest integers that every CPU sums exactly
CODABLE = [fmt for fmt in COMMON if codes.int8_shift(fmt) is not None]
ZERO_POINTS = [parse(f"int{bits}_zp") for bits in range(2, 8)]


@pytest.fixture(autouse=True, params=WAYS)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose_way(request.param, monkeypatch)
    return str(request.param)


@pytest.mark.parametrize("fmt", [fmt for fmt in COMMON if fmt.bits <= 8], ids=str)
def test_which_formats_are_8_bit_integers_follows_from_their_values(fmt: Any) -> None:
    values = code_values(fmt).double()
    values = values[values.isfinite() & (values.abs() <= fmt.max_value)]
    shifts = [k for k in range(64) if bool((values * 2**k == (values * 2**k).round()).all())]
    expected = next((k for k in shifts if bool((values.abs() * 2**k <= 127).all())), None)
    assert codes.int8_shift(fmt) == expected


@pytest.mark.parametrize("name", ["int8_zp", "int4_g32", "int4_g32_zp", "mxint8", "nvfp4"])
def test_what_has_scales_of_blocks_or_a_wider_range_is_no_8_bit_integer(name: str) -> None:
    assert codes.int8_shift(parse(name)) is None


@pytest.mark.parametrize("fmt", ZERO_POINTS, ids=str)
def test_codes_with_a_zero_point_are_those_of_the_reference_path(fmt: Any) -> None:
    layer, x = packed(nn.Linear(97, 8), "int4", fmt.name), some(50, 97) * torch.logspace(-30, 30, 50)[:, None]
    x[3], x[4], x[5] = 0, x[4].abs(), -x[5].abs()
    found, scale = codes.quantized_codes(layer, x)
    assert torch.equal((found.float() - codes.ZERO_POINT) * scale, layer.quantized_input(x))
    x[0, 1], x[1, 1] = torch.nan, torch.inf
    with torch.no_grad():
        assert layer(x)[:2].isnan().all() and layer(x)[2:].isfinite().all()


@pytest.mark.parametrize("weight", CODABLE, ids=str)
@pytest.mark.parametrize("activation", [*CODABLE, *ZERO_POINTS], ids=str)
def test_every_pair_of_formats_is_exact(weight: Any, activation: Any) -> None:
    torch.manual_seed(1)
    layer = packed(nn.Linear(37, 11), weight.name, activation.name)
    if weight.max_value * 2 ** (codes.int8_shift(weight) or 0) > int8.largest_exact_weight():
        assert layer.kernel.kernel == "decoded"
    else:
        assert_exact(layer, some(5, 37))


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor", "per_token_clipped", "static"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 48), (2, 2, 2, 48), (48,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_shapes_and_granularities(granularity: str, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(2)
    layer = packed(nn.Linear(48, 20, bias=bias), WEIGHT, "int8", granularity)
    assert_exact(layer, some(*shape))
    assert_exact(layer, some(*shape[:-1], 96)[..., ::2])  # not contiguous


@pytest.mark.parametrize("side", [(8, 8), (12, 8), (11, 9)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pair", [(WEIGHT, "int8"), ("int4", "e2m3"), ("e2m1", "int5"), ("int4", "int4_zp")], ids=str)
def test_patch_embeddings(side: tuple[int, int], batch: int, pair: tuple[str, str]) -> None:
    torch.manual_seed(3)
    assert_exact(packed(nn.Conv2d(3, 10, 4, stride=4), *pair), some(batch, 3, *side))


def test_every_row_is_independent_of_batch_and_threads() -> None:
    """Sums are exact and all else is element by element: the same bits, however the images are batched."""
    torch.manual_seed(4)
    layer, x = packed(nn.Linear(192, 576), WEIGHT, "int8"), some(200, 192)
    threads = torch.get_num_threads()
    try:
        with torch.inference_mode():
            torch.set_num_threads(1)
            together = layer(x)
            torch.set_num_threads(2)
            assert torch.equal(layer(x), together)
            for row in (0, 1, 77, 199):
                assert torch.equal(layer(x[row : row + 1]), together[row : row + 1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_out_as_they_went_in(dtype: torch.dtype) -> None:
    layer, x = packed(nn.Linear(16, 8), WEIGHT, "int8"), some(4, 16).to(dtype)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.float()).to(dtype))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_row_only(bad: float) -> None:
    layer, x = packed(nn.Linear(16, 8), WEIGHT, "int8"), some(4, 16)
    x[2, 5] = bad
    with torch.no_grad():
        assert layer(x).isnan().any(1).tolist() == [False, False, True, False]
        assert layer(x)[2].isnan().all()


def test_a_static_scale_shows_nan_and_saturates_infinities() -> None:
    layer, x = packed(nn.Linear(16, 8), WEIGHT, "int8", "static"), some(4, 16)
    x[2, 5], x[3, 1] = torch.nan, torch.inf
    expected = x.clone()
    expected[3, 1] = 1e6
    with torch.no_grad():
        got = layer(x)
        assert got.isnan().any(1).tolist() == [False, False, True, False]
        assert torch.equal(got[3], layer(expected)[3])


def test_an_image_of_one_patch_is_a_product() -> None:
    layer = packed(nn.Conv2d(3, 8, 4, stride=4), WEIGHT, "int8")
    with torch.no_grad():
        assert layer.native_kernel(some(1, 3, 4, 4)) is not None
        assert layer.native_kernel(some(1, 3, 4, 3)) is None
    linear = packed(nn.Linear(16, 8), WEIGHT, "int8")
    assert (linear.in_features, linear.out_features) == (16, 8)


def test_zeros_give_the_bias() -> None:
    layer = packed(nn.Linear(16, 8), WEIGHT, "int8")
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(2, 16)), layer.bias.expand(2, -1))  # type: ignore[union-attr]


@pytest.mark.parametrize(("layer", "formats", "granularity", "reason"), [
    (nn.Conv2d(3, 4, 2, stride=2, dilation=2), (WEIGHT, "int8"), "per_token", "overlap"),
    (nn.Linear(8, 8), ("e4m3", "int8"), "per_token", "weights in e4m3"),
    (nn.Linear(8, 8), ("int8", "e5m2"), "per_token", "inputs in e5m2"),
    (nn.Linear(8, 8), ("int8", None), "per_token", "not quantized"),
    (nn.Conv2d(3, 4, 3, padding=1), (WEIGHT, "int8"), "per_token", "overlap or are padded"),
    (nn.Conv2d(4, 4, 2, stride=2, groups=2), (WEIGHT, "int8"), "per_token", "overlap or are padded"),
    (nn.Linear(codes.LONGEST_SUM, 1), (WEIGHT, "int8"), "per_token", "may exceed 32 bits"),
])  # fmt: skip
def test_what_has_no_exact_product_takes_the_reference_path(
    layer: nn.Module, formats: tuple[str, str | None], granularity: str, reason: str
) -> None:
    found = packed(copy.deepcopy(layer), *formats, granularity)
    assert found.kernel.kernel == "decoded" and reason in found.kernel.reason
    set_kernels(found, weight_cache="none")
    assert found.kernel.kernel == "reference" and reason in found.kernel.reason


def test_gradients_wrong_inputs_and_the_asked_for_reference_take_the_reference_path() -> None:
    layer = packed(nn.Linear(16, 8), WEIGHT, "int8")
    reference = copy.deepcopy(layer)
    reference.kernels = "reference"
    x = some(4, 16)
    layer.train()
    assert torch.equal(layer(x), reference(x))  # the bias wants a gradient, and the model is in training
    assert not torch.equal(layer(x).detach(), torch.no_grad()(layer)(x))  # so that this test can fail
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), reference(x))
    with torch.no_grad():
        assert layer(x[:0]).shape == (0, 8)
        with pytest.raises(RuntimeError, match="16"):
            layer(some(4, 15))
    assert reference.kernel.reason == "asked for"


def test_new_codes_are_used() -> None:
    layer, x = packed(nn.Linear(16, 8), WEIGHT, "int8"), some(4, 16)
    other = packed(nn.Linear(16, 8), WEIGHT, "int8")
    with torch.no_grad():
        layer(x)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
        layer.pack_(some(8, 16, seed=5))
        assert_exact(layer, x)


def test_a_copy_and_a_move_prepare_their_own() -> None:
    layer, x = packed(nn.Linear(16, 8), WEIGHT, "int8"), some(4, 16)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), expected)
        assert torch.equal(layer.to(torch.bfloat16).float()(x), layer(x))


class Attention(nn.Module):
    """Two layers that read one tensor, which may be written to in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor, change: float = 0.0) -> Tensor:
        q = self.q(x)
        if change:
            x.add_(change)
        return torch.cat([q, self.k(x)])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ["linear", "patches"])
def test_in_evaluation_mode_gradients_are_those_of_the_reference_path(kind: str, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    plain = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(3, 8, 4, stride=4)
    x = torch.randn((5, 16) if kind == "linear" else (2, 3, 8, 8), generator=generator)
    layer = packed(plain, "int4", "e2m1").eval()
    reference = copy.deepcopy(layer)
    reference.kernels = "reference"
    found = []
    for module in (layer, reference):
        assert module.bias is not None
        module.bias.requires_grad_(not frozen)
        source = x.clone().requires_grad_()
        output = module(source)
        (output * torch.arange(output.numel()).view_as(output)).sum().backward()
        found.append((output.detach(), source.grad, module.bias.grad))
    assert torch.equal(found[0][0], torch.no_grad()(layer)(x)) and not torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert (a is None and b is None and frozen) or torch.equal(a, b)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_shared_codes_are_never_stale(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    model = Attention().eval()
    pack_model(model, Allocation.uniform(["q", "k"], WEIGHT))
    set_kernels(model)
    alone = copy.deepcopy(model)
    made = []
    original = codes._codes
    monkeypatch.setattr(codes, "_codes", lambda *args: made.append(1) or original(*args))  # type: ignore[func-returns-value]
    with context():
        buffer = some(4, 16)
        model(buffer)
        assert len(made) == (1 if context is torch.no_grad else 2)
        for seed in (7, 8):  # the caller fills one buffer again and again
            buffer.copy_(some(4, 16, seed=seed))
            assert torch.equal(model(buffer), alone(some(4, 16, seed=seed)))
        changed = some(4, 16, seed=9)
        expected = torch.cat([alone.q(changed.clone()), alone.k(changed + 1.0)])
        assert torch.equal(model(changed, 1.0), expected)


ANY = [fmt.name for fmt in COMMON]


@pytest.mark.parametrize("activation", [*ANY, None], ids=str)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor", "per_token_clipped", "static"])
def test_a_decoded_weight_gives_the_bits_of_the_reference_path(activation: str | None, granularity: str) -> None:
    torch.manual_seed(7)
    for module, x in ((nn.Linear(24, 10), some(5, 24)), (nn.Conv2d(3, 4, 3, padding=1), some(2, 3, 7, 8))):
        layer = packed(module, "e4m3", activation, granularity)
        assert layer.kernel.kernel == "decoded"
        reference = copy.deepcopy(layer)
        reference.kernels = "reference"
        x.view(-1)[:8] = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1e-30, -1e-30, 1e30, 0.5])
        for dtype in (torch.float32, torch.bfloat16):
            values = x.to(dtype)
            for bad in (None, torch.nan, torch.inf):
                if bad is not None:
                    values[1].view(-1)[3] = bad
                with torch.no_grad():
                    got, expected = layer.to(dtype)(values), reference.to(dtype)(values)
                torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
                assert bool((got.signbit() == expected.signbit())[~got.isnan()].all())


def special(fmt: Any, rows: int, width: int) -> Tensor:
    """Values around every midpoint of the format, zeros of both signs, subnormals; rows with NaN, infinities."""
    values = code_values(fmt).float()
    values = values[values.isfinite()].unique()
    middle = (values[1:] + values[:-1]) / 2
    near = torch.cat([middle, middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))])
    x = torch.cat([values, near, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38, -2e-38])])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].repeat(rows * width // len(x) + 1)
    x = x[: rows * width].view(rows, width).clone()
    x[:, 0] = fmt.max_value  # so that the scale is a power of two and midpoints stay midpoints
    x *= torch.logspace(-40, 40, rows, base=2).round()[:, None].clamp_min(2.0**-20)
    x[1, 1], x[2, 2], x[3, 3], x[4] = torch.nan, torch.inf, -torch.inf, 0.0
    x[5] = torch.randn(width, generator=torch.Generator().manual_seed(1)) * 1e-40
    x[6:9] = some(3, width)
    return x


@pytest.mark.parametrize("fmt", CODABLE, ids=str)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor", "per_token_clipped", "static"])
@pytest.mark.parametrize("width", [5, 256])
@pytest.mark.parametrize("ways", ["compiled"], indirect=True)
def test_compiled_codes_and_scales_are_the_eager_ones(
    fmt: Any, granularity: Any, width: int, ways: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed(nn.Linear(width, 2), WEIGHT, fmt.name, granularity)
    x = special(fmt, 40, width)
    if granularity == "per_tensor":
        x[1:4] = 0.25
    for values in (x, x.bfloat16(), x.repeat(1, 2)[:, ::2], x.T.contiguous().T):
        values = values[..., :width] if values.shape[-1] != width else values
        found, scale = codes._codes(layer, values)
        with monkeypatch.context() as patch:
            patch.setattr(codes, "library", lambda: None)
            expected, expected_scale = codes._codes(layer, values)
        torch.testing.assert_close(
            scale.flatten(), expected_scale.flatten().expand(scale.numel()), rtol=0, atol=0, equal_nan=True
        )
        whole = ~scale.isnan().expand(len(values), 1).flatten()
        assert torch.equal(found[whole], expected[whole])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instruction sets of x86")
def test_a_saturating_cpu_is_noticed() -> None:
    """Without VNNI oneDNN adds pairs of 8-bit products in 16 bits: exact for weights up to 64 only."""
    code = (
        "from fliqs_hf.nn.native import int8\n"
        "print(int8.largest_exact_weight())\n"
        "import torch; print(torch.backends.cpu.get_cpu_capability())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    )  # fmt: skip
    assert run.stdout.splitlines()[0] == "64", run.stdout


def test_a_weight_beyond_the_exact_ones_takes_the_reference_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "largest_exact_weight", lambda: 64)
    kinds = {
        fmt: packed(nn.Linear(8, 8), fmt, "int8").kernel.kernel for fmt in ("int8", "int7", "e2m3", "e2m1", "int4")
    }
    assert kinds == {"int8": "decoded", "int7": "int8", "e2m3": "int8", "e2m1": "int8", "int4": "int8"}
