"""`fold_batchnorm`: batch norms into the convolutions before them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from fliqs_hf.cost import example_image
from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.quantizer import require_transformers
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.batchnorm import convolutions_before, fold_packed, fold_plain
from fliqs_hf.nn.select import is_searchable

logger = logging.getLogger(__name__)


def fold_batchnorm(model: Any, inputs: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Fold the batch norms of a Transformers model into the convolutions that they directly follow, in place.

    Of a packed model: the norm's factor goes into the weight's scale per output channel and the rest into the bias, so
    that no code changes; the norm is gone. The result saves and loads as any packed model, and `dequantize` brings
    the norms back, as ones that only add. Of a plain model: the factor goes into the weight, and the norm only adds,
    so that the result is an ordinary checkpoint; what is packed afterwards is another weight, whose norms any format
    can take in, also one without a scale per output channel.

    Which norm follows which convolution is found by running the model once. What stays, and why, is logged: an
    output that others read too, a module that runs more than once, a convolution in floating point in a packed model.

    Args:
        inputs: keyword arguments of the model's `forward`. Default: one black image of the size that its config says.
    Returns: convolution -> batch norm that was folded into it.
    Raises: ConfigError: a searchable model, whose norms still learn, no model of Transformers, or one that `inputs` do
        not run.
    Rounding: with u = 2⁻²⁴ each output differs from what exact arithmetic gives for the model before by at most
        3u·|g|·Σ|w·x| + u·|bias| (packed; plain: u in place of 3u), before float32 sums, whose errors both have.
    """
    require_transformers(model)
    if any(is_searchable(module) for module in model.modules()):
        raise ConfigError("a searchable model's batch norms still learn: pack it first, with fliqs_hf.quantize")
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return {}
    pairs = convolutions_before(model, {"pixel_values": example_image(model)} if inputs is None else inputs)
    packed = bool(packed_layers(model))
    folded, kept = (fold_packed if packed else fold_plain)(model, pairs)
    for name, reason in kept.items():
        logger.warning("%s: the batch norm %r stays: %s", type(model).__name__, name, reason)
    if packed and folded:
        config = model.config.quantization_config = model.hf_quantizer.quantization_config
        config.folded = {**(config.folded or {}), **folded}
    return folded
