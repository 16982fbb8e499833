"""What a model and an allocation cost: per-layer MACs by tracing, bit operations, weight bytes, targets."""

from fliqs_hf.cost.models import CostKind, CostTable, Target, bops, weight_bytes
from fliqs_hf.cost.shapes import LayerInfo, example_image, trace_layers, unlisted_bytes

__all__ = [
    "CostKind",
    "CostTable",
    "LayerInfo",
    "Target",
    "bops",
    "example_image",
    "trace_layers",
    "unlisted_bytes",
    "weight_bytes",
]
