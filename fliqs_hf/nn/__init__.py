"""Quantized layers: searchable (training) and packed (storage, inference), and how they get into a model."""

from fliqs_hf.nn.kinds import (
    LayerKind,
    PackedConv2d,
    PackedLinear,
    SearchableConv2d,
    SearchableLinear,
    register_kind,
    unregister_kind,
)
from fliqs_hf.nn.searchable import FormatSwitch, QuantizerSettings
from fliqs_hf.nn.select import quantizable_layers
from fliqs_hf.nn.swap import (
    format_switch,
    make_searchable,
    pack_model,
    packed_layers,
    restore,
    unpack_model,
)

__all__ = [
    "FormatSwitch",
    "LayerKind",
    "PackedConv2d",
    "PackedLinear",
    "QuantizerSettings",
    "SearchableConv2d",
    "SearchableLinear",
    "format_switch",
    "make_searchable",
    "pack_model",
    "packed_layers",
    "quantizable_layers",
    "register_kind",
    "restore",
    "unpack_model",
    "unregister_kind",
]
