"""The costs of all layers in all formats as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.checks import is_number
from fliqs_hf.cost.models import FP32_BITS, Cost, check_unique, find, paired
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import ConfigError, FormatError, TargetError
from fliqs_hf.formats import Format, parse


class CostTable:
    """Costs of all layers in all formats, made once; the cost of an allocation is then a gather and a sum.

    Attributes:
        layers: the L layers that are given formats; row order of the table. What cannot be quantized is not among
            them, and its bit operations are in `fixed_cost`.
        formats: the K formats to choose from; index order of the table.
        table: float64 [L, K, K], cost of a layer by weight format and activation format. On the CPU.
        measure: the cost whose values the table holds.
        peaks: float64 [L, K, K], what a layer takes while it runs, where the cost counts the largest; else None.
        fixed_peak: that of layers that are not in the table.
        fixed_cost: what every allocation pays on top, in the table's unit: layers of kind "fp32", those that are not
            searched, or `unlisted_bytes` for the size of a whole checkpoint. All costs and ranges below include it.

    All BOPs and bytes are whole numbers below 2**53, so float64 sums of them are exact.

    Args:
        alike: weights and inputs of a layer always have the same format, so that only such pairs need a known cost;
            `table` then holds the same value for every input format.

    Raises: ConfigError: no layers, layers of one name, an unknown kind, or a bad `fixed_cost`.
        FormatError: no formats, unknown or repeated ones.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        formats: Sequence[str | Format],
        kind: str | Cost = "bops",
        *,
        fixed_cost: float = 0.0,
        fixed_peak: float = 0.0,
        alike: bool = False,
    ) -> None:
        self.measure = find(kind)
        if not is_number(fixed_cost, 0):
            raise ConfigError(f"fixed_cost={fixed_cost!r} must be a finite number of at least 0")
        self.layers = tuple(layer for layer in layers if layer.quantizable)
        if not self.layers:
            raise ConfigError("a cost table needs at least one layer that can be quantized")
        self.formats = tuple(parse(fmt) for fmt in formats)
        in_fp32 = [layer for layer in layers if not layer.quantizable]
        self.fixed_cost = float(fixed_cost) + self.measure.beside
        self.fixed_cost += sum(self.measure.layer(layer, None) for layer in in_fp32)
        check_unique([layer.name for layer in self.layers])
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise FormatError(f"a cost table needs formats, each once, not {[fmt.name for fmt in self.formats]}")
        # No weight can have a format for inputs: its row stands for the dearest one, so that sums stay finite.
        weights = [fmt for fmt in self.formats if not fmt.for_inputs_only]
        if not weights:
            raise FormatError(f"{', '.join(fmt.name for fmt in self.formats)}: none of them is for weights")
        dearest = max(weights, key=lambda fmt: fmt.effective_bits)
        pairs = [
            [LayerFormats(dearest if weight.for_inputs_only else weight, activation) for activation in self.formats]
            for weight in self.formats
        ]
        if alike:  # of the other pairs nothing may be known, as in a table of what was measured
            pairs = [[LayerFormats(fmt, fmt)] * len(self.formats) for fmt in self.formats]
        costs = [[[self.measure.layer(layer, formats) for formats in row] for row in pairs] for layer in self.layers]
        self.table = torch.tensor(costs, dtype=torch.float64)
        self.peaks: Tensor | None = None
        if self.measure.peak is not None:
            peaks = [[[self.measure.peak_of(layer, one) for one in row] for row in pairs] for layer in self.layers]
            self.peaks = torch.tensor(peaks, dtype=torch.float64)
        self.fixed_peak = max([float(fixed_peak), *(self.measure.peak_of(layer, None) for layer in in_fp32)])
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def cost(self, weight_index: Tensor, activation_index: Tensor) -> Tensor:
        """Cost of each allocation, without synchronising with the host.

        Args:
            weight_index, activation_index: [..., L], int64, indices into `formats`, on one device.
        Returns: float64 [...], on that device.
        Raises: ConfigError: shapes that differ, or whose last dimension is not L.
        """
        if weight_index.shape != activation_index.shape or weight_index.shape[-1:] != (len(self.layers),):
            raise ConfigError(
                f"weight_index {list(weight_index.shape)} and activation_index {list(activation_index.shape)} "
                f"must both be [..., {len(self.layers)}], one index per layer"
            )
        table, rows = self.on(weight_index.device)
        cost = table[rows, weight_index, activation_index].sum(-1) + self.fixed_cost
        if self.peaks is None:
            return cost
        peaks = self.peaks.to(weight_index.device)[rows, weight_index, activation_index]
        return cost + peaks.amax(-1).clamp(min=self.fixed_peak)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`table` and the row numbers 0 … L−1 (int64) on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = (self.table.to(device), torch.arange(len(self.layers), device=device))
        return self._on_device[device]

    def of(self, allocation: Mapping[str, LayerFormats]) -> float:
        """Cost of an allocation, whose formats need not be among `formats`; layers it does not name are fp32.

        Raises: AllocationError: it names a layer that is not in the table.
        """
        pairs = paired(self.layers, allocation)
        peak = max(self.fixed_peak, *(self.measure.peak_of(*pair) for pair in pairs))
        return self.fixed_cost + sum(self.measure.layer(*pair) for pair in pairs) + peak

    def uniform(self, fmt: str | Format) -> float:
        """Cost with all layers' weights and activations in one format, which need not be among `formats`."""
        return self.of(Allocation.uniform([layer.name for layer in self.layers], fmt))

    def uniform_bits(self, bits: float) -> float:
        """Cost of the uniform model of so many bits, which may be a fraction: 2.5 bits are MACs × 6.25 BOPs.

        Where the table has formats of that many bits, it is the cheapest of them (BF16 has no scales, INT16 has).

        Raises: TargetError: `bits` is no number between 0 and 32, or no format and the cost knows formats only.
        """
        if not is_number(bits, 0, FP32_BITS):
            raise TargetError(f"bits={bits!r} must be a number between 0 and {FP32_BITS}")
        if exact := [fmt for fmt in self.formats if fmt.effective_bits == bits and not fmt.for_inputs_only]:
            return min(self.uniform(fmt) for fmt in exact)
        if self.measure.at_bits is None:
            raise TargetError(f"{self.measure.name} of {bits:g} bits is not known: no format of the table has so many")
        return self.fixed_cost + self.measure.at_bits(self.layers, bits)

    @property
    def fp32(self) -> float:
        """Cost of the unquantized model."""
        return self.of({})

    @property
    def reachable(self) -> tuple[float, float]:
        """Cheapest and dearest allocation over `formats`, every layer and role free to choose."""
        flat = self.table.flatten(1)
        low, high = float(flat.amin(1).sum()) + self.fixed_cost, float(flat.amax(1).sum()) + self.fixed_cost
        if self.peaks is None:
            return low, high
        peaks = self.peaks.flatten(1)
        low += max(self.fixed_peak, float(peaks.amin(1).max()))
        return low, high + max(self.fixed_peak, float(peaks.max()))
