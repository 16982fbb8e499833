"""Products of codes on CUDA devices: integers summed exactly, other formats that E4M3 holds as FP8.

A weight of 8 bits is multiplied as it is stored. A narrower one is unpacked in the registers of every block of the
product, or once, into one byte for each value, where the layer may keep its weight decoded: of many tokens that is
faster. What is compiled (`torch.compile`) calls the same products, behind an input that the compiler quantizes within
its own kernels, and unpacks.
"""

from __future__ import annotations

import math
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fliqs_hf.formats import BlockFormat, Format, parse
from fliqs_hf.nn.native.codes import STATIC_IMAGES, input_scale, int8_shift, no_integer_product, rows_of, shared
from fliqs_hf.quant.block import one_sided_codes
from fliqs_hf.quant.grid import grid_params, round_to_grid

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer

_E4M3_MAX, _E4M3_SMALLEST, _E4M3_MANTISSA = 448.0, 2.0**-9, 3
_FP8_CAPABILITY = (8, 9)  # Ada; products of E4M3
_SCALED_MULTIPLE = 16  # of what `torch._scaled_mm` takes
_LONGEST_ROW = 2**14  # values of an input that one block of threads holds


def fits_e4m3(fmt: Format) -> bool:
    """Whether E4M3 has every value of `fmt`, and the format one scale."""
    if not fmt.is_scaled or isinstance(fmt, BlockFormat):
        return False
    if fmt.is_integer:
        return fmt.max_value <= 2 ** (_E4M3_MANTISSA + 1)
    return (
        fmt.mantissa_bits <= _E4M3_MANTISSA and fmt.max_value <= _E4M3_MAX and fmt.smallest >= _E4M3_SMALLEST
    )  # fmt: skip


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def obstacle(layer: PackedLayer) -> str:
    """What keeps `layer` from a product of codes on its CUDA device; "" for nothing."""
    weight, activation = layer.formats.weight, layer.formats.activation
    if find_spec("triton") is None:
        return "Triton is not installed"
    if activation is None:
        return "the input is not quantized"
    if reason := layer.kind.not_a_product(layer):
        return reason
    if len(layer.kind.tokens.dims) > 1 and layer.settings.activation_granularity == "static":
        return STATIC_IMAGES
    if not unpacks(weight, layer.weight_shape[0]):
        return f"{layer.weight_shape[0]} rows of {weight.bits} bits do not end with their bytes"
    if not no_integer_product(layer):
        return ""
    for role, fmt in (("weights", weight), ("inputs", activation)):
        if not fits_e4m3(fmt):
            return f"{role} in {fmt} are neither 8-bit integers nor E4M3"
    if _capability(layer.weight_codes.device) < _FP8_CAPABILITY:
        return "this device has no products of E4M3"
    return ""


def unpacks(fmt: Format, rows: int) -> bool:
    """Whether a product can read a weight of `rows` rows from its packed codes: the parts of a byte must be whole rows
    (see `formats/packing.py`)."""
    return fmt.bits <= 8 and all(rows % (8 // width) == 0 for width in (1, 2, 4) if fmt.bits & width)


class CudaProduct:
    """One layer by its codes."""

    def __init__(self, layer: PackedLayer) -> None:
        activation = layer.formats.activation
        assert activation is not None
        self._exact = not no_integer_product(layer)
        self._factor = _factor(activation, self._exact)
        self._values: Tensor | None = None

    def __call__(self, layer: PackedLayer, x: Tensor) -> Tensor:
        """What `layer` computes of `x`, in its dtype."""
        if torch.compiler.is_compiling():
            codes, scales = _fused_codes(layer, x, self._exact)
        else:
            codes, scales = shared(layer, x, _INTEGERS if self._exact else _E4M3)
        rows = layer.kind.product_rows(layer, codes).contiguous()
        return layer.kind.product_output(layer, self._product(layer, rows, scales.reshape(-1), x.dtype), x.shape)

    def _product(self, layer: PackedLayer, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        from fliqs_hf.nn.native.triton_kernels import product

        weight_scale, fmt = layer.weight_scale, layer.formats.weight
        assert weight_scale is not None
        shape = (layer.weight_shape[0], layer.weight_shape[1:].numel())
        weight = self._weight(layer, shape)
        scaled = not self._exact and weight.dtype == codes.dtype and dtype == torch.bfloat16
        if scaled and scales.numel() == len(codes) and not any(size % _SCALED_MULTIPLE for size in shape):
            bias = None if layer.bias is None else layer.bias.to(dtype)
            columns = weight_scale.expand(shape[0])[None]
            result: Tensor = torch._scaled_mm(codes, weight.t(), scales[:, None], columns, bias, out_dtype=dtype)
            return result
        unit = (fmt.smallest if self._exact else 1.0) / self._factor
        return product(codes, weight, fmt, scales, weight_scale, layer.bias, shape, unit, dtype)

    def _weight(self, layer: PackedLayer, shape: tuple[int, int]) -> Tensor:
        """Values in the dtype of the input's codes: the layer's bytes where they are these, or kept beside them if the
        layer may keep its weight decoded; or else the packed codes, which compiled code always takes."""
        fmt, dtype = layer.formats.weight, _DTYPES[self._exact]
        if fmt.bits == 8 and (fmt.is_integer or fmt == parse("e4m3")):
            return layer.weight_codes.view(dtype).view(shape)
        if layer.weight_cache == "none" or torch.compiler.is_compiling():
            return layer.weight_codes
        if self._values is None:
            values = layer.code_values().view(shape)
            self._values = (values / fmt.smallest if self._exact else values).to(dtype)
        return self._values


def _factor(fmt: Format, exact: bool) -> float:
    """What codes of an input are its values times."""
    return 2.0 ** (int8_shift(fmt) or 0) if exact else 1.0


def _codes(layer: PackedLayer, x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Codes in the shape of `x`, int8 or float8_e4m3fn, and scales, one for each token, image or for all."""
    from fliqs_hf.nn.native.triton_kernels import quantize

    fmt = layer.formats.activation
    assert fmt is not None
    width = math.prod(x.shape[dim] for dim in layer.kind.tokens.dims)
    by_token = layer.settings.activation_granularity in ("per_token", "per_token_clipped") or fmt.scales_itself
    if not by_token or width > _LONGEST_ROW:
        return _fused_codes(layer, x, exact)
    codes, scales = quantize(
        x.reshape(-1, width).contiguous(), fmt, _factor(fmt, exact), layer.input_scale, _DTYPES[exact]
    )
    return codes.view(x.shape), scales


_INTEGERS, _E4M3 = partial(_codes, exact=True), partial(_codes, exact=False)
_DTYPES = {True: torch.int8, False: torch.float8_e4m3fn}


def _fused_codes(layer: PackedLayer, x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """`_codes` by operations of torch, which a compiler fuses with what gives `x`."""
    fmt, values = layer.formats.activation, x.float()
    assert fmt is not None
    if isinstance(fmt, BlockFormat):
        codes, scale = one_sided_codes(rows_of(layer, values), fmt)
        return codes.view(x.shape).to(torch.int8), scale
    scale = input_scale(layer, values)
    one = torch.ones((1,) * x.dim(), device=x.device)
    saturate = layer.input_scale is not None
    y = round_to_grid(values / scale, one, grid_params(fmt), saturate=saturate, integer=fmt.is_integer)
    return (y * _factor(fmt, exact)).to(_DTYPES[exact]), scale
