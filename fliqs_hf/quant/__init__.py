"""Scales and straight-through fake quantization: formats enter as data."""

from fliqs_hf.quant.fake import fake_quantize, quantize_activation, quantize_weight
from fliqs_hf.quant.scale import FormatData, format_data, format_table

__all__ = ["FormatData", "fake_quantize", "format_data", "format_table", "quantize_activation", "quantize_weight"]
