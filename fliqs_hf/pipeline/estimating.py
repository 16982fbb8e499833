"""What formats cost, before anything is searched, packed or trained: `fliqs_hf.estimate`."""

from __future__ import annotations

from typing import Any

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import unlisted_bytes
from fliqs_hf.formats import Format
from fliqs_hf.hf.quantizer import refuse_packed, require_transformers
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.pipeline.checkpoints import traced
from fliqs_hf.runs.folder import cost_summary


def estimate(model: Any, formats: Allocation | str | Format) -> dict[str, float]:
    """Costs of a model in memory in the given formats, beside those in fp32.

    Args:
        model: in fp32, of Transformers; it is run on one image to trace its layers, and left as it is.
        formats: of each layer, or one for all weights and inputs, such as "int8".
    Returns: "bops" and "fp32_bops" (bit operations per image), "bytes" and "fp32_bytes" (of the checkpoint less its
        header), "macs", and every registered cost that is known.
    Raises: ConfigError: a model that cannot be traced, or is packed. FormatError: no format. AllocationError: a layer
        that the model does not have.
    """
    require_transformers(model)
    refuse_packed(model)
    layers, _ = traced(model)
    if not isinstance(formats, Allocation):
        called = {layer.name for layer in layers if layer.quantizable}
        formats = Allocation.uniform([name for name in quantizable_layers(model) if name in called], formats)
    return cost_summary(layers, formats, unlisted_bytes(model, layers))
