"""Quantizers: what is quantized, by which scales. The format comes with each call, as it may change at every step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.quant.block import quantize_blocks, quantize_rows, weight_block_scale
from fliqs_hf.quant.fake import fake_quantize
from fliqs_hf.quant.grid import GridParams, grid_params
from fliqs_hf.quant.scale import (
    ActivationGranularity,
    ScaleMethod,
    WeightGranularity,
    activation_scale,
    check_choice,
    clipped_scale,
    weight_scale,
)
from fliqs_hf.quant.tokens import Tokens


@dataclass(frozen=True)
class WeightQuantizer:
    """Of a weight [out, ...].

    Attributes:
        granularity: of formats without scales of their own.
        method: "absmax", or "mse" for scales of least squared error.

    Raises: FormatError: a setting that does not exist.
    """

    granularity: WeightGranularity = "per_channel"
    method: ScaleMethod = "absmax"

    def __post_init__(self) -> None:
        check_choice("weight_granularity", self.granularity, WeightGranularity)
        check_choice("weight_scale", self.method, ScaleMethod)

    def scale(self, weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
        """What a code is worth, float32: broadcasts to `weight`, of block formats [out, blocks, 1]; and of these the
        float32 [1, 1, 1] that is in all of them."""
        if isinstance(fmt, BlockFormat):
            return weight_block_scale(weight.detach().flatten(1), fmt, self.method)
        return weight_scale(weight.detach(), grid_params(fmt), self.granularity, self.method), None

    def __call__(self, weight: Tensor, fmt: Format | GridParams, integer: bool = False) -> Tensor:
        """Fake-quantize `weight` with its own scale; its shape and dtype.

        Args:
            integer: of `GridParams`: it is of an integer format. Saves two passes over memory.
        """
        if isinstance(fmt, BlockFormat):
            flat = weight.flatten(1)
            scale, _ = weight_block_scale(flat.detach(), fmt, self.method)
            return quantize_blocks(flat, fmt, scale).view(weight.shape)
        data, integer = _data(fmt, integer)
        scale = weight_scale(weight.detach(), data, self.granularity, self.method)
        return fake_quantize(weight, scale, data, saturate=self.method != "absmax", integer=integer)


@dataclass(frozen=True)
class InputQuantizer:
    """Of what a layer reads.

    Attributes:
        tokens: what one token is, and the direction of blocks: along the features of a Linear, and along the channels
            of each pixel of a convolution, whose token is the image. The float32 of E4M3 scales is one per token, so
            that no result depends on the batch.
        granularity: of formats without scales of their own; "per_tensor" holds for the float32 too.
    """

    tokens: Tokens
    granularity: ActivationGranularity = "per_token"

    def __call__(self, x: Tensor, fmt: Format | GridParams, integer: bool = False) -> Tensor:
        """Fake-quantize `x` with its own scale; its shape and dtype.

        Args:
            integer: as for `WeightQuantizer`.
        Raises: FormatError: a granularity that needs a number from calibration, and a format that heeds it.
        """
        if isinstance(fmt, BlockFormat):
            return self._by_blocks(x, fmt)
        data, integer = _data(fmt, integer)
        scale = activation_scale(x.detach(), data, self.tokens, self.granularity)
        return fake_quantize(x, scale, data, saturate=False, integer=integer)

    def clipped(self, x: Tensor, fmt: Format | GridParams, factor: Tensor, integer: bool = False) -> Tensor:
        """The same with a factor on the scale of each token, float32 [1], which gets a gradient; formats with scales
        of their own have no use for it."""
        if isinstance(fmt, BlockFormat):
            return self._by_blocks(x, fmt)
        data, integer = _data(fmt, integer)
        return fake_quantize(x, clipped_scale(x.detach(), data, self.tokens, factor), data, integer=integer)

    def _by_blocks(self, x: Tensor, fmt: BlockFormat) -> Tensor:
        whole_batch = self.granularity == "per_tensor"
        dims, features = self.tokens.dims, self.tokens.features
        if fmt.block is None and len(dims) > 1:
            return quantize_rows(x.flatten(-len(dims)), fmt, None).view(x.shape)
        last = x.movedim(features, -1)
        return quantize_rows(last, fmt, None if whole_batch else dims).movedim(-1, features)


def _data(fmt: Format | GridParams, integer: bool) -> tuple[GridParams, bool]:
    return (fmt, integer) if isinstance(fmt, GridParams) else (grid_params(fmt), fmt.is_integer)


def quantize_weight(
    weight: Tensor,
    fmt: Format | GridParams,
    granularity: WeightGranularity = "per_channel",
    method: ScaleMethod = "absmax",
    integer: bool = False,
) -> Tensor:
    """Once by a `WeightQuantizer`."""
    return WeightQuantizer(granularity, method)(weight, fmt, integer)


def quantize_activation(
    x: Tensor,
    fmt: Format | GridParams,
    tokens: Tokens,
    granularity: ActivationGranularity = "per_token",
    integer: bool = False,
) -> Tensor:
    """Once by an `InputQuantizer`."""
    return InputQuantizer(tokens, granularity)(x, fmt, integer)
