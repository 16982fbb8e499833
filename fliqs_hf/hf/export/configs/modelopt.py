"""An allocation as a `quant_cfg` of NVIDIA's ModelOpt, in the YAML that its `load_config` reads (ModelOpt 0.47)."""

from __future__ import annotations

from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.hf.export.configs.counterpart import Counterpart, Layer, counterpart, layers_of, unquantized, wider
from fliqs_hf.nn.kinds import CONV1D, CONV2D, LINEAR
from fliqs_hf.nn.searchable import QuantizerSettings

FILE = "modelopt.yaml"
#: What ModelOpt's loader validates the file as.
HEADER = "# modelopt-schema: modelopt.torch.quantization.config.QuantizeConfig\n"
Attributes = dict[str, Any]

#: ModelOpt's integers are symmetric with it, as ours are.
_INTEGER = {"narrow_range": True}


def modelopt_config(
    model: Any, allocation: Allocation, settings: QuantizerSettings
) -> tuple[dict[str, Any], tuple[Counterpart, ...]]:
    """`QuantizeConfig`: every quantizer off, then those of the layers; and what each layer became.

    Raises: ConfigError: ModelOpt has no counterpart of any layer. AllocationError: the model has not all layers.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    found = []
    for layer in layers_of(model, allocation):
        weight, weight_changes = _weight(layer, settings)
        inputs, input_changes = _inputs(layer, settings)
        for role, attributes in (("weight", weight), ("input", inputs)):
            if attributes is not None:
                entries.append({"quantizer_name": f"{layer.name}.{role}_quantizer", "cfg": attributes})
        became = " × ".join(_name(attributes) for attributes in (weight, inputs))
        found.append(
            counterpart(
                layer,
                became if weight or inputs else "unquantized",
                list(dict.fromkeys([*weight_changes, *input_changes])),
            )
        )
    if len(entries) == 1:
        raise ConfigError(f"ModelOpt has no counterpart of any layer: {found[0].name!r}, {found[0].changed}")
    return {"quant_cfg": entries, "algorithm": "max"}, tuple(found)


def _weight(layer: Layer, settings: QuantizerSettings) -> tuple[Attributes | None, list[str]]:
    """None for what stays as it is; and what is not as in the allocation."""
    fmt, said = layer.formats.weight, []
    if layer.kind not in (LINEAR, CONV1D, CONV2D):
        return None, [_no_kind(layer)]
    if isinstance(fmt, BlockFormat):
        if layer.kind is LINEAR:
            said = ["weight scales in fp32 instead of bf16"] if fmt.scale == "bf16" else []
            return _blocks(fmt), said
        return None, [f"weights stay unquantized: ModelOpt's blocks run along the kernel, those of {fmt} along a row"]
    bits, said = _bits(fmt, "weights")
    axis = 0 if settings.weight_granularity == "per_channel" else None
    return None if bits is None else {**bits, "axis": axis}, said


def _inputs(layer: Layer, settings: QuantizerSettings) -> tuple[Attributes | None, list[str]]:
    fmt, granularity = layer.formats.activation, settings.activation_granularity
    if layer.kind not in (LINEAR, CONV1D, CONV2D):
        return None, [_no_kind(layer)]
    if fmt is None:
        return None, []
    if isinstance(fmt, BlockFormat):
        if layer.kind is LINEAR and fmt.scale in ("e8m0", "e4m3"):
            return _blocks(fmt), []
        granularity = "per_token"
    bits, said = _bits(fmt, "inputs")
    if bits is None:
        return None, said
    if granularity == "static":
        return {**bits, "axis": None}, said
    if granularity == "per_tensor":
        return {**bits, "type": "dynamic", "axis": None}, said
    if granularity == "per_token_clipped":
        said = [*said, "input scales without their calibrated factors"]
    if layer.kind is LINEAR:
        return {**bits, "type": "dynamic", "block_sizes": {-1: None, "type": "dynamic"}}, said
    return {**bits, "type": "dynamic", "axis": 0}, said  # an image


def _bits(fmt: Format, role: str) -> tuple[Attributes | None, list[str]]:
    """Of formats with one scale for each channel, token or tensor: integers and E4M3."""
    if not isinstance(fmt, BlockFormat) and fmt.is_integer:
        return {"num_bits": fmt.bits, **_INTEGER}, []
    if fmt.name == "e4m3":
        return {"num_bits": "e4m3"}, []
    instead = wider(fmt)
    if instead is None:
        return None, [unquantized(role, fmt, "ModelOpt")]
    bits = {"num_bits": instead.bits, **_INTEGER} if instead.is_integer else {"num_bits": instead.name}
    return bits, [f"{role} in {instead} instead of {fmt}"]


def _blocks(fmt: BlockFormat) -> Attributes:
    if fmt.scale == "bf16":
        return {"num_bits": fmt.bits, **_INTEGER, "block_sizes": {-1: fmt.block, "type": "static"}}
    element: int | str = fmt.bits if fmt.is_integer else str(fmt.element)
    return {"num_bits": element, "block_sizes": {-1: fmt.block, "type": "dynamic", "scale_bits": fmt.scale}}


def _no_kind(layer: Layer) -> str:
    return f"what ModelOpt makes of a {layer.kind.plain.__name__} is not known here"


def _name(attributes: Attributes | None) -> str:
    if attributes is None:
        return "fp32"
    bits, sizes = attributes["num_bits"], attributes.get("block_sizes", {})
    name = f"int{bits}" if isinstance(bits, int) else str(bits)
    return f"{name} in {sizes[-1]}" if sizes.get(-1) else name
