"""An allocation as torchao's `FqnToConfig`, in the JSON that its `config_from_dict` reads (torchao 0.18)."""

from __future__ import annotations

from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import BlockFormat
from fliqs_hf.hf.export.configs.counterpart import Counterpart, Layer, counterpart, layers_of, unquantized, wider
from fliqs_hf.nn.kinds import LINEAR
from fliqs_hf.nn.searchable import QuantizerSettings

FILE = "torchao.json"
Config = dict[str, Any]

#: torchao scales by output channel and by token alone: what is said where the allocation has it otherwise.
_PER_ROW = {
    "per_tensor": "input scales per token instead of per tensor",
    "static": "input scales per token instead of static ones",
    "per_token_clipped": "input scales without their calibrated factors",
}
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
_ASYMMETRIC = {"_type": "MappingType", "_data": "ASYMMETRIC"}
_E4M3 = "float8_e4m3fn"
#: Block formats whose elements are values of E4M3.
_IN_MXFP8 = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3")


def torchao_config(
    model: Any, allocation: Allocation, settings: QuantizerSettings
) -> tuple[Config, tuple[Counterpart, ...]]:
    """The config of every layer, and what it became.

    Raises: ConfigError: torchao has no counterpart of any layer. AllocationError: the model has not all layers.
    """
    configs: dict[str, Config | None] = {}
    found = []
    for layer in layers_of(model, allocation):
        config, changes = _config(layer)
        if config is not None:
            if settings.weight_granularity == "per_tensor" and not isinstance(layer.formats.weight, BlockFormat):
                changes.append("weight scales per channel instead of per tensor")
            if (said := _PER_ROW.get(settings.activation_granularity)) and _scales_inputs(layer, config):
                changes.append(said)
        configs[layer.name] = config
        found.append(counterpart(layer, "unquantized" if config is None else config["_type"], changes))
    if all(config is None for config in configs.values()):
        raise ConfigError(f"torchao has no counterpart of any layer: {found[0].name!r}, {found[0].changed}")
    return _typed("FqnToConfig", fqn_to_config=configs), tuple(found)


def _config(layer: Layer) -> tuple[Config | None, list[str]]:
    """None for what stays as it is; and what is not as in the allocation."""
    weight, activation = layer.formats.weight, layer.formats.activation
    if layer.kind is not LINEAR:
        return None, [f"torchao quantizes no {layer.kind.plain.__name__} this way"]
    if isinstance(weight, BlockFormat):
        if weight.name == "nvfp4":
            return _nvfp4(layer)
        if not weight.is_integer or weight.scale == "e8m0":
            return _mx(layer)
    if weight.is_integer and weight.bits <= 8:
        return _integers(layer)
    if weight.name == "e5m2":
        changes = [] if activation is None else [unquantized("inputs", activation, "torchao")]
        return _typed("Float8WeightOnlyConfig", 2, weight_dtype=_dtype("float8_e5m2"), granularity=_rows()), changes
    if wider(weight) is not None:
        return _float8(layer)
    return None, [unquantized("weights", weight, "torchao")]


def _integers(layer: Layer) -> tuple[Config | None, list[str]]:
    """Weights of up to 8 bits by channel or group, inputs in INT8 by token."""
    weight, activation = layer.formats.weight, layer.formats.activation
    group = weight.block if isinstance(weight, BlockFormat) else None
    if group is not None and layer.row % group:
        return None, [f"torchao has no rows of {layer.row} in groups of {group}"]
    eight = group is None and weight.bits == 8
    grain = _typed("PerAxis", axis=0) if group is None else _typed("PerGroup", group_size=group)
    scales = _dtype("float32" if group is None else "bfloat16")
    codes = {"weight_dtype": _dtype(f"int{weight.bits}")}
    # The scale that clips nothing: torchao's integers have one code more below zero.
    mapping = {"_type": "MappingType", "_data": "SYMMETRIC_NO_CLIPPING_ERR"}
    if activation is None or not activation.is_integer or activation.bits > 8:
        changes = [] if activation is None else [unquantized("inputs", activation, "torchao")]
        if eight:
            return _typed("Int8WeightOnlyConfig", 2, granularity=_rows()), changes
        return _typed(
            "IntxWeightOnlyConfig", 2, **codes, granularity=grain, mapping_type=mapping, scale_dtype=scales
        ), changes
    # Beside narrower weights torchao has inputs with a zero point alone.
    one_sided = not eight or (isinstance(activation, BlockFormat) and activation.zero_point)
    wanted = "int8_zp" if one_sided else "int8"
    changes = [] if activation.name == wanted else [f"inputs in {wanted} instead of {activation}"]
    inputs = {"act_mapping_type": _ASYMMETRIC if one_sided else _SYMMETRIC}
    if eight:
        return _typed("Int8DynamicActivationInt8WeightConfig", 2, **inputs, granularity=_rows()), changes
    return _typed(
        "Int8DynamicActivationIntxWeightConfig", 2, **codes, weight_granularity=grain, weight_mapping_type=mapping,
        weight_scale_dtype=scales, **inputs,
    ), changes  # fmt: skip


def _float8(layer: Layer) -> tuple[Config, list[str]]:
    """E4M3, and narrower floats in it."""
    weight, activation = layer.formats.weight, layer.formats.activation
    changes = [] if weight.name == "e4m3" else [f"weights in e4m3 instead of {weight}"]
    if activation is None or activation.is_integer or wider(activation) is None:
        changes += [] if activation is None else [unquantized("inputs", activation, "torchao")]
        return _typed("Float8WeightOnlyConfig", 2, weight_dtype=_dtype(_E4M3), granularity=_rows()), changes
    changes += [] if activation.name == "e4m3" else [f"inputs in e4m3 instead of {activation}"]
    return _typed(
        "Float8DynamicActivationFloat8WeightConfig", 2, activation_dtype=_dtype(_E4M3), weight_dtype=_dtype(_E4M3),
        granularity=[_rows(), _rows()],
    ), changes  # fmt: skip


def _mx(layer: Layer) -> tuple[Config | None, list[str]]:
    """One element for weights and inputs: FP4 where both have it, else E4M3."""
    weight, activation = layer.formats.weight, layer.formats.activation
    names = (weight.name, "" if activation is None else activation.name)
    if not set(names) <= set(_IN_MXFP8):
        return None, [f"torchao has no {weight} for weights and {activation or 'fp32'} for inputs"]
    if layer.row % 32:
        return None, [f"torchao has no rows of {layer.row} in blocks of 32"]
    element, became = ("float4_e2m1fn_x2", "mxfp4") if set(names) == {"mxfp4"} else (_E4M3, "mxfp8_e4m3")
    changes = [
        f"{role} in {became} instead of {name}"
        for role, name in zip(("weights", "inputs"), names, strict=True)
        if name != became
    ]
    floor = {"_type": "ScaleCalculationMode", "_data": "FLOOR"}  # as OCP MX has it, and we
    dtype = _dtype(element)
    return _typed(
        "MXDynamicActivationMXWeightConfig", block_size=32, activation_dtype=dtype, weight_dtype=dtype,
        scaling_mode=floor,
    ), changes  # fmt: skip


def _nvfp4(layer: Layer) -> tuple[Config | None, list[str]]:
    activation = layer.formats.activation
    if layer.row % 16 or layer.shape[0] % 16:
        return None, [f"torchao has no nvfp4 of {layer.shape[0]} × {layer.row}: both are to be multiples of 16"]
    scale = {"use_dynamic_per_tensor_scale": True}
    if activation is not None and activation.name == "nvfp4":
        return _typed("NVFP4DynamicActivationNVFP4WeightConfig", **scale), []
    changes = [] if activation is None else [unquantized("inputs", activation, "torchao")]
    return _typed("NVFP4WeightOnlyConfig", **scale), changes


def _scales_inputs(layer: Layer, config: Config) -> bool:
    """Whether inputs are quantized there by what had a scale of the settings here."""
    activation = layer.formats.activation
    own = activation is None or activation.scales_itself or not activation.is_scaled
    return not own and "DynamicActivation" in config["_type"]


def _typed(kind: str, version: int = 1, **data: Any) -> Config:
    return {"_type": kind, "_version": version, "_data": data}


def _dtype(name: str) -> Config:
    return {"_type": "torch.dtype", "_data": name}


def _rows() -> Config:
    return _typed("PerRow", dim=-1)
