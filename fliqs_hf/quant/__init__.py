"""Scales and straight-through fake quantization: formats enter as data."""

from fliqs_hf.quant.fake import fake_quantize
from fliqs_hf.quant.grid import GridParams, format_table, grid_params, round_to_grid
from fliqs_hf.quant.quantizers import InputQuantizer, WeightQuantizer, quantize_activation, quantize_weight
from fliqs_hf.quant.tokens import IMAGE, ROW, Tokens

__all__ = [
    "IMAGE",
    "ROW",
    "GridParams",
    "InputQuantizer",
    "Tokens",
    "WeightQuantizer",
    "fake_quantize",
    "format_table",
    "grid_params",
    "quantize_activation",
    "quantize_weight",
    "round_to_grid",
]
