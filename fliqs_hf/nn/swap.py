"""Turning layers into searchable, packed and plain ones, in place; what raises leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.formats import Format, parse
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.replace import Places, replace
from fliqs_hf.nn.searchable import FormatSwitch, QuantizerSettings, SharedInput
from fliqs_hf.nn.select import is_searchable, quantizable_layers, why_not

#: What a searchable layer has beside what its plain class gives it.
_ATTRIBUTES = ("plain", "switch", "row", "input_quantizer", "shared_input")


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
    Raises: AllocationError: a name that is no quantizable layer. ConfigError: the model is searchable already, or
        keeps a layer where nothing can take its place (see `Places`).
    """
    layers = quantizable_layers(model)
    names = list(layers) if names is None else list(names)
    for name in names:
        if name not in layers:
            raise AllocationError(f"cannot make searchable: {why_not(model, name)}")
        if is_searchable(layers[name]):
            raise ConfigError("the model is searchable already; call `restore(model)` first")
    Places(model, {name: layers[name] for name in names})  # what could not be packed later is refused now
    switch = FormatSwitch(names, [parse(fmt) for fmt in formats], settings or QuantizerSettings())
    groups = {name: (input_groups or {}).get(name) for name in names}
    switch.input_groups = tuple(groups.values())
    readers = Counter(group for group in groups.values() if group is not None)
    clipped = switch.settings.clipped
    shared = {group: SharedInput(count) for group, count in readers.items() if count > 1 and not clipped}
    for row, name in enumerate(names):
        layer = layers[name]
        # Changing the class keeps parameters, hooks and every reference to the layer as they are.
        kind, plain = kind_of(layer), type(layer)
        layer.__class__ = kind.searchable
        values = plain, switch, row, switch.settings.inputs(kind.tokens), shared.get(groups[name])  # type: ignore[arg-type]
        layer.__dict__.update(zip(_ATTRIBUTES, values, strict=True))
        if clipped:
            layer.register_parameter("input_clip", nn.Parameter(torch.zeros(1, device=layer.weight.device)))  # type: ignore[arg-type]
        switch.prepare(layer.weight.device)  # type: ignore[arg-type]
    return switch


def format_switch(model: nn.Module) -> FormatSwitch:
    """The switch of a searchable model. Raises: ConfigError: the model is not searchable."""
    for module in model.modules():
        if is_searchable(module):
            return module.switch  # type: ignore[return-value]
    raise ConfigError(
        f"this {type(model).__name__} is not searchable; load it with FLIQSConfig(search_space=…) "
        "or call make_searchable"
    )


def restore(model: nn.Module) -> None:
    """Turn searchable layers back into plain ones, in place."""
    for module in model.modules():
        if is_searchable(module):
            module.__class__ = module.plain  # type: ignore[assignment]
            for attribute in _ATTRIBUTES:
                del module.__dict__[attribute]
            module._parameters.pop("input_clip", None)


def packed_like(
    layer: nn.Module, formats: LayerFormats, settings: QuantizerSettings, dtype: torch.dtype | None = None
) -> PackedLayer:
    """An empty packed layer with the geometry, bias and device of `layer`."""
    kind, weight, bias = kind_of(layer), layer.weight, layer.bias
    assert isinstance(weight, torch.Tensor)
    arguments = (kind.weight_shape(layer), formats, settings, bias, weight.device, dtype or weight.dtype)
    packed: PackedLayer = kind.packed(*arguments, geometry=kind.geometry(layer))  # type: ignore[assignment]
    return packed.train(layer.training)


def pack_model(model: nn.Module, allocation: Allocation, settings: QuantizerSettings | None = None) -> None:
    """Replace layers by packed ones in the formats of `allocation`, in place; the others become plain layers.

    Raises: AllocationError: a name that is no quantizable layer. ConfigError: numbers for input scales that the model
        has not learned, and only `fliqs_hf.ptq.calibrate` gives; clipping factors that it has learned, and that the
        settings would drop; or a layer that the model also keeps where nothing can take its place (see `Places`).
        FormatError: weights that are not finite. Nothing is changed then.
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
            raise AllocationError(f"the allocation names {why_not(model, name)}")
    replace(model, {name: packed_version(layers[name], formats, settings) for name, formats in allocation.items()})
    restore(model)


def packed_version(layer: nn.Module, formats: LayerFormats, settings: QuantizerSettings) -> PackedLayer:
    """A packed layer that computes what a plain or searchable `layer` would in these formats. `layer` stays as it is.

    Raises: FormatError: a weight that is not finite.
    """
    packed = packed_like(layer, formats, settings)
    packed.pack_(packed.kind.rows(layer, layer.weight))  # type: ignore[arg-type]
    if settings.clipped and packed.input_scale is not None:
        packed.input_scale = layer.clip_factor().detach()  # type: ignore[operator]
    return packed


@contextmanager
def standing_in(pairs: Mapping[PackedLayer, PackedLayer]) -> Iterator[None]:
    """Within this context each layer (a key) is what the other one is, wherever the model keeps it: buffers, formats,
    kernels. Hooks of the layer do not run then.
    """
    _exchange(pairs)
    try:
        yield
    finally:
        _exchange(pairs)


def _exchange(pairs: Mapping[PackedLayer, PackedLayer]) -> None:
    for one, other in pairs.items():
        one.__dict__, other.__dict__ = other.__dict__, one.__dict__


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def unpack_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace packed layers by plain ones that hold the decoded weights, in place. Inputs are quantized no longer."""
    replacements: dict[str, nn.Module] = {}
    for name, packed in packed_layers(model).items():
        weight = packed.kind.parameter(packed, packed.decoded_weight()).to(dtype or packed.dtype)
        plain = packed.kind.make_plain(packed, bias=packed.bias is not None)
        plain.weight = nn.Parameter(weight)
        if packed.bias is not None:
            plain.bias = nn.Parameter(packed.bias.detach().to(weight.dtype))
        replacements[name] = plain.train(packed.training)
    replace(model, replacements)
