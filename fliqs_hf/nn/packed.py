"""Packed layers: weights as bit-packed codes, for storage and inference.

By its reference path a packed layer computes exactly what the searchable layer computes in the same formats, bit for
bit: its weight decodes to the very values that fake quantization gives, and its input is quantized by the same
function. Where `kernels` is "auto", inference takes a faster kernel if there is one: see `nn/native` for what it
rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.errors import CheckpointError, ConfigError, FormatError
from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.formats.packing import pack, packed_bytes, unpack
from fliqs_hf.formats.rounding import decode, encode, round_to_format
from fliqs_hf.nn import native
from fliqs_hf.nn.finite import all_finite
from fliqs_hf.nn.native.gradient import WithGradient
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.quant import InputQuantizer, fake_quantize, grid_params, round_to_grid
from fliqs_hf.quant.block import decode_scales, encode_scales, from_blocks, to_blocks
from fliqs_hf.quant.scale import CALIBRATED

if TYPE_CHECKING:
    from fliqs_hf.nn.kinds.kind import LayerKind

#: What multiplies. `torch.einsum`, `@` and the rest arrive as these.
_PRODUCTS = frozenset({
    functional.linear, functional.bilinear, functional.conv1d, functional.conv2d, functional.conv3d,
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
    torch.einsum, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.addmv,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm,
    Tensor.baddbmm, Tensor.addmv,
})  # fmt: skip


#: What tells about a weight without its values.
_ABOUT = frozenset({
    *(getattr(Tensor, name).__get__ for name in (
        "dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad", "is_cuda", "is_meta",
    )),
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
})  # fmt: skip


class DecodedWeight(Tensor):
    """A packed layer's weight, to look at. A product with it is refused: the input would be quantized by nobody, and a
    searchable model would compute something else.

    Raises: ConfigError: a product.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            shape = next(list(arg.shape) for arg in args if isinstance(arg, DecodedWeight))
            raise ConfigError(
                f"a product with the weight {shape} of a packed layer that is not called itself, so that its input is "
                "not quantized: leave the layer out with modules_to_not_convert, or use layer.decoded_weight()"
            )
        return super().__torch_function__(func, types, args, kwargs or {})


class LazyWeight(DecodedWeight):
    """One that is decoded when its values are read: models ask a weight for its dtype in every forward pass."""

    _layer: PackedLayer

    @staticmethod
    def of(layer: PackedLayer) -> Tensor:
        codes = layer.weight_codes
        shape = layer.kind.parameter(layer, codes.new_empty(layer.weight_shape, device="meta")).shape
        weight = Tensor._make_wrapper_subclass(LazyWeight, shape, dtype=layer.dtype, device=codes.device)
        weight._layer = layer
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func not in _PRODUCTS:
            args, kwargs = tree_map_only(LazyWeight, lambda w: w._decoded().as_subclass(DecodedWeight), (args, kwargs))
        return DecodedWeight.__torch_function__(func, (DecodedWeight,), args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyWeight, LazyWeight._decoded, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _decoded(self) -> Tensor:
        layer = self._layer
        return layer.kind.parameter(layer, layer.decoded_weight()).to(layer.dtype)


class PackedLayer(nn.Module):
    """Bit-packed weight of one layer, [out, ...] whatever the layout of its kind's parameter.

    Buffers:
        weight_codes: uint8 [`packed_bytes(weight_numel, bits)`], see `formats/packing.py` for the layout.
        weight_scale: float32, [out] per channel or [1] per tensor; absent where the format is used unscaled (BF16).
        weight_scale_codes: uint8, codes of the scales of a block format, row by row: E8M0 or E4M3, or BF16 as
            `formats.pack` packs its 16 bits. Then there is a `weight_scale`, [1], only with E4M3.
        input_scale: float32 [1]; only where the activation granularity is "static", for which it is what one code step
            of the input is worth, or "per_token_clipped": the factor on the absmax scale of each token. NaN until it
            is calibrated or loaded, so that nothing runs on a number that nobody has chosen.

    The scales stay float32 whatever the model is cast to.
    """

    is_fliqs_layer = True
    kind: LayerKind
    weight_codes: Tensor
    weight_scale: Tensor | None
    weight_scale_codes: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None
    kernels: native.Kernels = "reference"
    weight_cache: native.WeightCache = "none"
    _native: native.Native | None = None
    _compiled: native.Kernel | None = None  # found before a compiler traces the layer, which could not

    def __init__(
        self,
        weight_shape: torch.Size,
        formats: LayerFormats,
        settings: QuantizerSettings,
        bias: nn.Parameter | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        geometry: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            weight_shape: [out, ...].
            geometry: what else the kind's `multiply` reads, set as attributes.
        """
        super().__init__()
        self.geometry = dict(geometry or {})
        self.__dict__.update(self.geometry)
        self.weight_shape = torch.Size(weight_shape)
        self.formats = formats
        self.settings = settings
        self.dtype = dtype or torch.get_default_dtype()
        fmt = formats.weight
        scales = self.weight_shape[0] if settings.weight_granularity == "per_channel" else 1
        scale_codes = None
        if isinstance(fmt, BlockFormat):
            scales = 1
            size = fmt.scale_bytes(self.weight_shape) - 4 * (fmt.scale == "e4m3")
            scale_codes = torch.zeros(size, dtype=torch.uint8, device=device)
        codes = torch.zeros(
            packed_bytes(self.weight_shape.numel(), formats.weight.bits), dtype=torch.uint8, device=device
        )
        self.register_buffer("weight_codes", codes)
        self.register_buffer(
            "weight_scale",
            torch.ones(scales, dtype=torch.float32, device=device) if _has_float_scale(fmt) else None,
        )
        self.register_buffer("weight_scale_codes", scale_codes)
        calibrated = settings.activation_granularity in CALIBRATED
        calibrated = calibrated and formats.activation is not None and _has_own_range(formats.activation)
        self.register_buffer(
            "input_scale", torch.full((1,), torch.nan, dtype=torch.float32, device=device) if calibrated else None
        )
        self.register_parameter("bias", bias)
        granularity = settings.activation_granularity
        # There is nothing to calibrate in a format that is used unscaled, or has scales of its own.
        dynamic = granularity not in CALIBRATED or calibrated
        self._input_quantizer = InputQuantizer(self.kind.tokens, granularity if dynamic else "per_token")

    @torch.no_grad()
    def pack_(self, weight: Tensor, scale: Tensor | None = None, whole: Tensor | None = None) -> None:
        """Quantize and pack `weight` [out, ...] on its own device.

        Args:
            scale: float32 [out, 1, ...] per channel or [1, ...] per tensor, instead of the one that the settings give.
                A weight that lies on the grid of this scale keeps its values exactly.
            scale, whole: of a block format, as `WeightQuantizer.scale` gives them.
        Raises: FormatError: a weight that is not finite.
        """
        if not bool(torch.isfinite(weight).all()):
            raise FormatError("cannot pack a weight that holds NaN or infinity; check the checkpoint it comes from")
        fmt, settings = self.formats.weight, self.settings
        data = grid_params(fmt)
        weight = weight.float()
        if scale is None:
            scale, whole = settings.weights.scale(weight, fmt)
        if isinstance(fmt, BlockFormat):
            assert whole is not None
            blocks = to_blocks(weight.flatten(1), fmt) / scale
            blocks = round_to_grid(blocks, torch.ones_like(scale), data, saturate=True, integer=fmt.is_integer)
            units = from_blocks(blocks, weight[0].numel())
            self.weight_scale_codes = encode_scales(scale, fmt, whole)
            scale = whole
        elif fmt.is_scaled:
            # On the grid in units of one code: the very arithmetic of fake quantization, less the final scaling.
            units = round_to_grid(weight / scale, torch.ones_like(scale), data, saturate=True, integer=fmt.is_integer)
        else:
            # That arithmetic overflows above 2**111. As there, zeros come out as +0.
            units = round_to_format(weight, fmt) + 0.0
        self.weight_codes = pack(encode(units, fmt).flatten(), fmt.bits)
        if _has_float_scale(fmt):
            self.weight_scale = scale.flatten()

    @property
    def weight(self) -> Tensor:
        """The weight, in the layout and dtype of the layer's own, to look at. Decoded anew at each access."""
        if torch.compiler.is_compiling():
            return self.kind.parameter(self, self.decoded_weight()).to(self.dtype)
        return LazyWeight.of(self)

    def code_values(self) -> Tensor:
        """Values of the codes before scaling, float32 [weight_numel]."""
        fmt = self.formats.weight
        return decode(unpack(self.weight_codes, fmt.bits, self.weight_shape.numel()), fmt, check=False)

    def decoded_weight(self) -> Tensor:
        """code value × scale, float32, `weight_shape`."""
        values = self.code_values().view(self.weight_shape)
        fmt = self.formats.weight
        if isinstance(fmt, BlockFormat):
            flat = values.flatten(1)
            blocks = to_blocks(flat, fmt) * self.block_scales()
            return from_blocks(blocks, flat.shape[1]).reshape(self.weight_shape)
        if self.weight_scale is None:
            return values
        return values.mul_(self.weight_scale.view(-1, *[1] * (len(self.weight_shape) - 1)))

    def block_scales(self) -> Tensor:
        """Scales of a block format, float32 [out, blocks, 1]."""
        fmt, codes = self.formats.weight, self.weight_scale_codes
        assert isinstance(fmt, BlockFormat) and codes is not None
        return decode_scales(codes, fmt, self.weight_scale).view(*fmt.scale_shape(self.weight_shape), 1)

    def quantized_input(self, input: Tensor) -> Tensor:
        """`input` on the grid of the activation format, in its own shape and dtype."""
        fmt = self.formats.activation
        if fmt is None:
            return input
        if self.input_scale is None:
            return self._input_quantizer(input, fmt)
        if self.settings.clipped:
            return self._input_quantizer.clipped(input, fmt, self.input_scale)
        return fake_quantize(input, self.input_scale, fmt, integer=fmt.is_integer)

    def quantized(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantized_input(input), self.decoded_weight().to(input.dtype)

    @property
    def kernel(self) -> native.Choice:
        """What runs in inference, and why."""
        if self.kernels == "reference":
            return native.Choice("reference", "asked for")
        if self._native is None or not self._native.is_of(self):
            self._native = native.Native(self)
        return self._native.choice

    def multiply(self, input: Tensor, weight: Tensor) -> Tensor:
        """The layer's operation, in floating point. Args: weight: [out, ...]."""
        return self.kind.multiply(self, input, weight, self.bias)

    def needs_gradient(self, input: Tensor) -> bool:
        learns = self.bias is not None and self.bias.requires_grad
        return torch.is_grad_enabled() and (input.requires_grad or learns)

    def native_kernel(self, input: Tensor) -> native.Kernel | None:
        """The kernel for `input`, or None for the reference path: it alone trains, can be exported, and reports inputs
        that do not fit."""
        if self.kernels == "reference" or torch.jit.is_tracing() or torch.is_autocast_enabled(input.device.type):
            return None
        if torch.compiler.is_compiling():
            exported = torch.compiler.is_exporting() or self.needs_gradient(input)
            return None if exported or input.device.type != "cuda" else self._compiled
        if self.training and self.needs_gradient(input):
            return None
        if self._native is None or not self._native.is_of(self):
            self._native = native.Native(self)
        if input.device != self._native.device or not self.kind.takes(self, input):
            return None
        return self._native.kernel(self)

    def reference(self, input: Tensor) -> Tensor:
        """The layer by its decoded weight."""
        return self.multiply(*self.quantized(input))

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.native_kernel(input)
        if kernel is None:
            return self.reference(input)
        if self.needs_gradient(input):
            output: Tensor = WithGradient.apply(input, self.bias, self, kernel)
            return output
        return kernel(self, input)

    def check_codes(self, name: str) -> None:
        """Raises: CheckpointError: codes of NaN or infinity, or scales that are not positive numbers."""
        for buffer, scale in (("weight_scale", self.weight_scale), ("input_scale", self.input_scale)):
            if scale is not None and not bool((scale > 0).all() & scale.isfinite().all()):
                raise CheckpointError(f"{name}.{buffer} holds a value that is no positive number; the file is damaged")
        if self.weight_scale_codes is not None:
            scales = self.block_scales()
            if not bool((scales > 0).all() & scales.isfinite().all()):
                raise CheckpointError(
                    f"{name}.weight_scale_codes holds a scale that is no positive number; the file is damaged"
                )
        if self.formats.weight.has_special_codes and not all_finite(self.code_values()):
            raise CheckpointError(
                f"{name}.weight holds codes that are no finite number in {self.formats.weight}; "
                "the file is damaged, or of another format"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = {name: getattr(self, name) for name in ("weight_scale", "input_scale")}
        super()._apply(fn, recurse)
        for name, scale in before.items():
            after = getattr(self, name)
            if scale is not None and after.dtype != scale.dtype:
                setattr(self, name, scale.to(after.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.choose_kernels(self.kernels, self.weight_cache)
        return self

    def choose_kernels(self, kernels: native.Kernels, weight_cache: native.WeightCache) -> None:
        """Choose anew, see `nn.kernels.set_kernels`."""
        self.kernels, self.weight_cache, self._native = kernels, weight_cache, None
        self._compiled = native.compiled_kernel(self) if kernels == "auto" else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}  # a copy prepares its own

    def extra_repr(self) -> str:
        return f"{tuple(self.weight_shape)}, {self.formats}, bias={self.bias is not None}"


def _has_float_scale(fmt: Format) -> bool:
    """Whether a weight has scales in float32: per channel or tensor, or the one in all E4M3 scales."""
    return fmt.scale == "e4m3" if isinstance(fmt, BlockFormat) else fmt.is_scaled


def _has_own_range(fmt: Format) -> bool:
    """Whether the scale of an input can be a number from calibration."""
    return fmt.is_scaled and not fmt.scales_itself
