"""What a model and an allocation cost: per-layer MACs by tracing, registered costs, tables of them, targets."""

from fliqs_hf.cost.energy import ENERGY
from fliqs_hf.cost.models import Cost, bops, register, registered, unregister, weight_bytes
from fliqs_hf.cost.shapes import LayerInfo, example_image, trace_layers, unlisted_bytes
from fliqs_hf.cost.table import CostTable
from fliqs_hf.cost.target import Target, target_kinds

__all__ = [
    "ENERGY",
    "Cost",
    "CostTable",
    "LayerInfo",
    "Target",
    "bops",
    "example_image",
    "register",
    "registered",
    "target_kinds",
    "trace_layers",
    "unlisted_bytes",
    "unregister",
    "weight_bytes",
]
