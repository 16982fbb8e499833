"""Which operators of ONNX a packed layer becomes, how its codes are stored, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.formats.rounding import code_values
from fliqs_hf.nn.native.codes import int8_shift, no_integer_product
from fliqs_hf.nn.packed import PackedLayer

#: auto: integer products, with an operator of ONNX Runtime's own where that is faster. integer: the same in standard
#: operators. qdq: QuantizeLinear and DequantizeLinear around floating-point products, for TensorRT and NPUs.
Form = Literal["auto", "integer", "qdq"]
InputScales = Literal["as_packed", "per_tensor"]
WeightCodes = Literal["signed", "unsigned"]

#: The opset with 4-bit types, and the one with 2-bit types.
OPSETS = range(21, 26)
_TWO_BITS = 25
#: Sums of two products of uint8 and int8 fit into 16 bits up to this code: CPUs without VNNI sum them there.
_EXACT_IN_16_BITS = 64
_KNOWN_BUFFERS = {"weight_codes", "weight_scale", "weight_scale_codes", "input_scale"}
_GRANULARITIES = ("per_token", "per_tensor", "per_token_clipped", "static")


@dataclass(frozen=True)
class OnnxSettings:
    """How layers become operators of ONNX.

    Attributes:
        form: see `Form`.
        input_scales: "per_tensor" gives layers with 8-bit integer inputs one scale and zero point for the whole batch.
        opset: 21 to 25; there are 2-bit types from 25 on.
        weight_codes: "unsigned" stores codes beyond ±64 with a zero point: x86 CPUs without VNNI saturate products of
            uint8 with such int8, silently. Slower where there is VNNI.
        external_data: weights in a file of their own, as is always done above 1.8 GB.
    Raises: ConfigError: a value that does not exist.
    """

    form: Form = "auto"
    input_scales: InputScales = "as_packed"
    opset: int = OPSETS.start
    weight_codes: WeightCodes = "signed"
    external_data: bool = False

    def __post_init__(self) -> None:
        for setting, choices in (("form", Form), ("input_scales", InputScales), ("weight_codes", WeightCodes)):
            if (value := getattr(self, setting)) not in get_args(choices):
                raise ConfigError(f"{setting}={value!r} does not exist; choose from {', '.join(get_args(choices))}")
        if self.opset not in OPSETS:
            raise ConfigError(f"opset={self.opset!r}: give {OPSETS.start} to {OPSETS.stop - 1}")


@dataclass(frozen=True)
class LayerForm:
    """What becomes of one layer.

    Attributes:
        weight, activation: its formats, "fp32" for an input that is not quantized.
        form: "integer": a product of 8-bit integers; "qdq": of quantized and dequantized tensors; "float": of tensors
            that are rounded to their formats, in fp32; "compressed": of an input as it comes with a weight that is
            decoded; "reference": the operations of the packed layer itself.
        stored: the type of the codes in the file.
        changed: what is not as in the packed layer, and why; "" where nothing is.
    """

    name: str
    weight: str
    activation: str
    form: Literal["integer", "qdq", "float", "compressed", "reference"]
    stored: str
    changed: str


def layer_form(name: str, layer: PackedLayer, settings: OnnxSettings) -> LayerForm:
    """Raises: ConfigError: a layer that cannot be expressed."""
    check_expressible(name, layer)
    weight, activation = layer.formats.weight, layer.formats.activation
    reason = not_integer(layer)
    kind: Literal["integer", "qdq", "float"] = "float" if reason else "qdq" if settings.form == "qdq" else "integer"
    changed = f"fp32 product: {reason}" if reason else ""
    if asymmetric(layer, settings.input_scales) and kind == "integer":
        changed = "input scale of the whole batch, with a zero point, as asked for"
    stored, shift = storage(weight, settings.opset)
    wide = stored == "INT8" and weight.max_value * 2**shift > _EXACT_IN_16_BITS
    if wide and kind == "integer" and settings.weight_codes == "unsigned":
        stored = "UINT8"
    return LayerForm(name, str(weight), str(activation or "fp32"), kind, stored, changed)


def check_expressible(name: str, layer: PackedLayer) -> None:
    """Raises: ConfigError: a layer of a kind that is not known here: it must not be written as something else."""
    granularity = layer.settings.activation_granularity
    unknown = {key for key, _ in layer.named_buffers(recurse=False)} - _KNOWN_BUFFERS
    scales = 0 if layer.weight_scale is None else layer.weight_scale.numel()
    if not layer.kind.onnx or unknown or granularity not in _GRANULARITIES:
        raise ConfigError(
            f"{name!r}, {type(layer).__name__} in {layer.formats}, cannot be exported: its kind is not known"
        )
    if scales not in (0, 1, layer.weight_shape[0]):
        raise ConfigError(f"{name!r} has {scales} weight scales: those per tensor or channel can be exported")
    if layer.geometry.get("padding_mode", "zeros") != "zeros":
        raise ConfigError(f"{name!r}: padding_mode={layer.geometry['padding_mode']!r} cannot be exported")


def not_integer(layer: PackedLayer) -> str:
    """Why the layer is no product of 8-bit integers; "" where it is."""
    if reason := no_integer_product(layer):
        return reason
    if layer.kind.onnx == "ConvTranspose":
        return "ONNX has no integer form of transposed convolutions"
    if layer.geometry.get("groups", 1) > 1:
        return "a grouped convolution, whose integer form is slower"
    return ""


def asymmetric(layer: PackedLayer, scales: InputScales) -> bool:
    """Whether `DynamicQuantizeLinear` takes the place of the layer's own input scale."""
    own = layer.settings.activation_granularity in ("static", "per_tensor")
    fmt = layer.formats.activation
    return scales == "per_tensor" and not own and fmt is not None and fmt.is_integer and fmt.bits == 8


def storage(fmt: Format, opset: int) -> tuple[str, int]:
    """The narrowest ONNX type that holds every value of `fmt`, times 2**shift, exactly, and this shift; of
    a format with blocks those of its elements.

    "UINT4" stands for positions in a table of 16 values: for 4-bit formats that are no 4-bit integers.
    """
    if isinstance(fmt, BlockFormat):
        fmt = fmt.element
    values = code_values(fmt).float()
    values = values[values.isfinite()]
    if (shift := int8_shift(fmt)) is not None:
        low, high = (float(v) * 2**shift for v in torch.aminmax(values))
        if low >= -2 and high <= 1 and opset >= _TWO_BITS:
            return "INT2", shift
        if low >= -8 and high <= 7:
            return "INT4", shift
        return ("UINT4" if fmt.bits <= 4 else "INT8"), shift
    for name, dtype in (("FLOAT8E4M3FN", torch.float8_e4m3fn), ("FLOAT8E5M2", torch.float8_e5m2),
                        ("INT16", torch.int16), ("FLOAT16", torch.float16), ("BFLOAT16", torch.bfloat16)):  # fmt: skip
        if bool((values.abs() <= _largest(dtype)).all()) and torch.equal(values.to(dtype).float(), values):
            return name, 0
    return "FLOAT", 0


def _largest(dtype: torch.dtype) -> float:
    return float((torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max)
