"""Which layers are quantized, and turning them into searchable, packed and plain layers, in place."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.formats import Format, parse
from fliqs_hf.nn.packed import PackedConv2d, PackedLayer, PackedLinear
from fliqs_hf.nn.searchable import (
    FormatSwitch,
    QuantizerSettings,
    SearchableConv2d,
    SearchableLinear,
    SharedInput,
)

_SEARCHABLE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SearchableLinear, nn.Conv2d: SearchableConv2d}


def matches(name: str, pattern: str) -> bool:
    """Whether a module name matches: `re:` + regular expression (searched for), else a glob over the whole name, a
    dotted part of it (`classifier`, `encoder.layer.3`) or the exact name.

    Raises: ConfigError: a regular expression that does not compile.
    """
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is not a regular expression: {error}") from error
    return fnmatch.fnmatchcase(name, pattern) or f".{pattern}." in f".{name}."


def _plain_type(module: nn.Module) -> type[nn.Module] | None:
    """`nn.Linear` or `nn.Conv2d` for layers that compute exactly what these compute, None for everything else.

    A subclass may do anything; accepted is only a convolution that merely has a constructor of its own (EfficientNet's
    depthwise one). Not so for Linear: `nn.MultiheadAttention` has such a subclass and uses its weight without calling
    it.
    """
    cls = type(module)
    if cls in _SEARCHABLE:
        return cls
    plain_forward = getattr(cls, "_conv_forward", None) is nn.Conv2d._conv_forward and cls.forward is nn.Conv2d.forward
    return nn.Conv2d if plain_forward else None


def _is_searchable(module: nn.Module) -> bool:
    return isinstance(module, (SearchableLinear, SearchableConv2d))


def quantizable_layers(model: nn.Module, modules_to_not_convert: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The layers that can be quantized, by name in the order of the model: `nn.Linear` and `nn.Conv2d` themselves
    (subclasses with behaviour of their own are left alone) and layers that are searchable already.

    Args:
        modules_to_not_convert: patterns (see `matches`) of layers to leave out.
    Raises: ConfigError: a pattern that matches no layer.
    """
    layers = {name: module for name, module in model.named_modules() if _plain_type(module) or _is_searchable(module)}
    excluded: set[str] = set()
    for pattern in modules_to_not_convert or ():
        hits = {name for name in layers if matches(name, pattern)}
        if not hits:
            raise ConfigError(
                f"modules_to_not_convert: {pattern!r} matches none of the {len(layers)} Linear and Conv2d layers "
                f"of {type(model).__name__}, such as {next(iter(layers), None)!r}"
            )
        excluded |= hits
    return {name: module for name, module in layers.items() if name not in excluded}


def make_searchable(
    model: nn.Module,
    formats: Sequence[str | Format],
    *,
    names: Iterable[str] | None = None,
    input_groups: Mapping[str, int] | None = None,
    settings: QuantizerSettings | None = None,
) -> FormatSwitch:
    """Turn layers into searchable ones, in place. Parameters stay the same objects under the same names.

    Args:
        names: the layers; default: all of `quantizable_layers`.
        input_groups: layer -> group; layers of one group read the same tensor and share its quantized copy, so they
            must always be given the same activation format. (Where each learns a factor of its own, each has a copy.)
        settings: with `activation_granularity="per_token_clipped"` every layer gets a parameter, `input_clip`.
    Returns: the switch that chooses their formats. At first every layer has the first of `formats`.
    Raises: AllocationError: a name that is no quantizable layer. ConfigError: the model is searchable already.
    """
    layers = quantizable_layers(model)
    names = list(layers) if names is None else list(names)
    for name in names:
        if name not in layers:
            raise AllocationError(f"{name!r} is not a Linear or Conv2d layer of {type(model).__name__}")
        if _is_searchable(layers[name]):
            raise ConfigError("the model is searchable already; call `restore(model)` first")
    switch = FormatSwitch(names, [parse(fmt) for fmt in formats], settings or QuantizerSettings())
    groups = {name: (input_groups or {}).get(name) for name in names}
    switch.input_groups = tuple(groups.values())
    readers = Counter(group for group in groups.values() if group is not None)
    clipped = switch.settings.clipped
    shared = {group: SharedInput(count) for group, count in readers.items() if count > 1 and not clipped}
    for row, name in enumerate(names):
        layer = layers[name]
        # Changing the class keeps parameters, hooks and every reference to the layer as they are.
        plain, layer.__class__ = type(layer), _SEARCHABLE[_plain_type(layer)]  # type: ignore[index]
        attributes = {"plain": plain, "switch": switch, "row": row, "shared_input": shared.get(groups[name])}  # type: ignore[arg-type]
        layer.__dict__.update(attributes)
        if clipped:
            layer.register_parameter("input_clip", nn.Parameter(torch.zeros(1, device=layer.weight.device)))  # type: ignore[arg-type]
    return switch


def format_switch(model: nn.Module) -> FormatSwitch:
    """The switch of a searchable model. Raises: ConfigError: the model is not searchable."""
    for module in model.modules():
        if _is_searchable(module):
            return module.switch  # type: ignore[return-value]
    raise ConfigError(
        f"this {type(model).__name__} is not searchable; load it with FLIQSConfig(search_space=…) "
        "or call make_searchable"
    )


def restore(model: nn.Module) -> None:
    """Turn searchable layers back into plain ones, in place."""
    for module in model.modules():
        if _is_searchable(module):
            module.__class__ = module.plain  # type: ignore[assignment]
            for attribute in ("plain", "switch", "row", "shared_input"):
                del module.__dict__[attribute]
            module._parameters.pop("input_clip", None)


def packed_like(
    layer: nn.Module, formats: LayerFormats, settings: QuantizerSettings, dtype: torch.dtype | None = None
) -> PackedLayer:
    """An empty packed layer with the geometry, bias and device of `layer`."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    arguments = (weight.shape, formats, settings, bias, weight.device, dtype or weight.dtype)
    packed = PackedConv2d(layer, *arguments) if isinstance(layer, nn.Conv2d) else PackedLinear(*arguments)  # type: ignore[arg-type]
    return packed.train(layer.training)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def pack_model(model: nn.Module, allocation: Allocation, settings: QuantizerSettings | None = None) -> None:
    """Replace layers by packed ones in the formats of `allocation`, in place; the others become plain layers.

    Raises: AllocationError: a name that is no quantizable layer. ConfigError: numbers for input scales that the model
        has not learned, and only `fliqs_hf.ptq.calibrate` gives; or clipping factors that it has learned, and that
        the settings would drop. Nothing is changed then.
    """
    settings = settings or QuantizerSettings()
    layers = quantizable_layers(model)
    learned = ["input_clip" in layers[name]._parameters for name in allocation if name in layers]
    settings.require_dynamic(learned=all(learned))
    if any(learned) and not settings.clipped:
        raise ConfigError(
            f"activation_granularity={settings.activation_granularity!r} would drop the clipping factors that the "
            "model has learned: pack it with 'per_token_clipped'"
        )
    for name in allocation:
        if name not in layers:
            raise AllocationError(
                f"the allocation names {name!r}, which is no Linear or Conv2d of {type(model).__name__}"
            )
    for name, formats in allocation.items():
        packed = packed_like(layers[name], formats, settings)
        packed.pack_(layers[name].weight)  # type: ignore[arg-type]
        if settings.clipped and packed.input_scale is not None:
            packed.input_scale = layers[name].clip_factor().detach()  # type: ignore[operator]
        replace(model, name, packed)
    restore(model)


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def unpack_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace packed layers by plain ones that hold the decoded weights, in place. Inputs are quantized no longer."""
    for name, packed in packed_layers(model).items():
        weight = packed.decoded_weight().to(dtype or packed.dtype)
        plain: nn.Module
        if isinstance(packed, PackedConv2d):
            plain = nn.Conv2d(**packed.geometry, bias=packed.bias is not None, device="meta")
        else:
            out_features, in_features = packed.weight_shape
            plain = nn.Linear(in_features, out_features, bias=packed.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        if packed.bias is not None:
            plain.bias = nn.Parameter(packed.bias.detach().to(weight.dtype))
        replace(model, name, plain.train(packed.training))
