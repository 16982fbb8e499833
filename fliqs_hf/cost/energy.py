"""Energy of a model's products and of reading its weights, from published figures per operation.

Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9 (45 nm,
0.9 V). Other processes have other figures; what carries over is how formats compare. Between the published widths, and
below them, energies lie on the straight line through the two figures in logarithms: what is said of floats of fewer
than 16 bits and of integers of fewer than 8 is extrapolated.
"""

from __future__ import annotations

import math

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost.models import FP32_BITS, WEIGHT_BYTES, Cost, register
from fliqs_hf.cost.shapes import LayerInfo

#: pJ per multiplication by bits.
INTEGER_MULTIPLY = {8: 0.2, 32: 3.1}
FLOAT_MULTIPLY = {16: 1.1, 32: 3.7}
#: pJ per addition in 32 bits, in which sums are kept.
INTEGER_ADD, FLOAT_ADD = 0.1, 0.9
#: pJ per bit: 64 bits take 1.3 to 2.6 nJ, and this is the lower figure.
DRAM_READ = 1300 / 64


def multiply_pj(formats: LayerFormats | None) -> float:
    """Of one product of a weight and an input. Different widths count by their geometric mean; a product with an input
    that is not quantized is one of floats of 32 bits, whatever the weight was stored as."""
    if formats is None or formats.activation is None:
        return FLOAT_MULTIPLY[32]
    whole = formats.weight.is_integer and formats.activation.is_integer
    (low, at_low), (high, at_high) = (INTEGER_MULTIPLY if whole else FLOAT_MULTIPLY).items()
    power = math.log(at_high / at_low) / math.log(high / low)
    width = math.sqrt(formats.weight.bits * formats.activation.bits)
    return at_high * float((width / high) ** power)


def layer_uj(layer: LayerInfo, formats: LayerFormats | None) -> float:
    """Of one image, its weights read once from memory: products, their sums, and the weights with their scales. What
    inputs take to be moved, and the scales of blocks to be applied, is not counted."""
    floats = formats is None or formats.activation is None
    whole = not floats and formats.weight.is_integer and formats.activation.is_integer  # type: ignore[union-attr]
    products = layer.macs * (multiply_pj(formats) + (INTEGER_ADD if whole else FLOAT_ADD))
    stored = WEIGHT_BYTES.layer(layer, formats) if layer.quantizable else layer.weight_numel * FP32_BITS / 8
    return (products + 8 * stored * DRAM_READ) / 1e6


ENERGY = register(Cost("energy_uj", "µJ per image at 45 nm", layer_uj))
