"""Times where no device is at hand: what its arithmetic and its memory allow at best."""

from __future__ import annotations

from collections.abc import Sequence

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost.hardware import Profile
from fliqs_hf.cost.latency import BETWEEN, FP32, LatencyRow, LatencyTable, names_of
from fliqs_hf.cost.models import WEIGHT_BYTES
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import ConfigError

#: What inputs and outputs have between layers, where products run in bf16.
_BETWEEN_BYTES = 2


def roofline(
    profile: Profile, layers: Sequence[LayerInfo], pairs: Sequence[LayerFormats], batch_size: int
) -> LatencyTable:
    """For each layer the longer of two times: of its products at the device's rate for the pair, and of moving its
    packed weights, its inputs and its outputs (in two bytes each) at the bandwidth of the memory.

    A pair that is carried runs at the rate of the pair that carries it, one that is simulated, and fp32, at that of
    bf16. Launches, caches and whatever is between the layers count nothing: it is a bound from below, and orders
    formats rather than predicting milliseconds. Inputs of overlapping convolutions count once per window.

    Raises: ConfigError: a profile without the figures that it needs.
    """
    if profile.bandwidth_gb_s is None or profile.bf16_tflops is None:
        raise ConfigError(
            f"the profile {profile.name} has no bandwidth_gb_s and bf16_tflops, which an estimate needs: measure with "
            "fliqs-hf profile on the device, or add them to a profile of your own"
        )
    rows = [LatencyRow(BETWEEN, FP32, FP32, 0.0, 0.0, 0.0, "roofline")]
    for layer in layers:
        if not layer.quantizable:
            continue
        inputs = layer.macs // layer.out_channels
        moved = batch_size * _BETWEEN_BYTES * (inputs + layer.macs * layer.out_channels // layer.weight_numel)
        for formats in (None, *pairs):
            products = 2 * layer.macs * batch_size / (profile.rate(formats) * profile.bf16_tflops * 1e12)
            memory = (WEIGHT_BYTES.layer(layer, formats) + moved) / (profile.bandwidth_gb_s * 1e9)
            ms = 1e3 * max(products, memory)
            shape = (layer.macs, layer.weight_numel, layer.out_channels)
            rows.append(LatencyRow(layer.name, *names_of(formats), ms, ms, ms, "roofline", *shape))
    conditions = {
        "estimated": True, "device": profile.title, "batch_size": batch_size,
        "how": f"roofline of the profile {profile.name}: {profile.bf16_tflops:g} TFLOPS in bf16, "
        f"{profile.bandwidth_gb_s:g} GB/s; not measured",
    }  # fmt: skip
    return LatencyTable(tuple(rows), conditions)
