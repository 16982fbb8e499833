"""What an allocation costs: bit operations and weight bytes, as plain functions, as one table, and as a target.

A layer that the allocation does not name runs in fp32 on both sides; an activation of `None` is fp32 too. Both count
as 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.checks import is_number
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import AllocationError, ConfigError, FormatError, TargetError
from fliqs_hf.fields import check_fields
from fliqs_hf.formats import Format, parse
from fliqs_hf.wording import figure

CostKind = Literal["bops", "weight_bytes"]
TargetKind = Literal["bits", "bops", "size_mb", "ratio"]

FP32_BITS = 32
SCALE_BYTES = 4  # one float32 per output channel


def bops(layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]) -> int:
    """Bit operations per image: sum over layers of MACs × weight bits × activation bits, which include an element's
    share of the scales in formats of blocks (MXFP4: 4.25), rounded to a whole number in each layer.

    Raises: AllocationError: the allocation names a layer that is not among `layers`.
    Source: FLIQS (Dotzel et al. 2024), section 3, cost model C(a).
    """
    return sum(_bops(layer, formats) for layer, formats in _pairs(layers, allocation))


def weight_bytes(layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats], *, other_bytes: int = 0) -> int:
    """Bytes of the packed weights with their scales, one float32 per output channel (the default granularity) where
    the format is scaled, or with those of its blocks.

    Biases and everything else that is not the weight of one of `layers`, and layers of kind "fp32", are not included;
    give them as `other_bytes` (`unlisted_bytes(model, layers)`) for the size of the checkpoint.

    Raises: AllocationError: the allocation names a layer that is not among `layers`.
    """
    return other_bytes + sum(_weight_bytes(layer, formats) for layer, formats in _pairs(layers, allocation))


class CostTable:
    """Costs of all layers in all formats, made once; the cost of an allocation is then a gather and a sum.

    Attributes:
        layers: the L layers that are given formats; row order of the table. What cannot be quantized is not among
            them, and its bit operations are in `fixed_cost`.
        formats: the K formats to choose from; index order of the table.
        table: float64 [L, K, K], cost of a layer by weight format and activation format. On the CPU.
        fixed_cost: what every allocation pays on top, in the table's unit: layers of kind "fp32", those that are not
            searched, or `unlisted_bytes` for the size of a whole checkpoint. All costs and ranges below include it.

    All BOPs and bytes are whole numbers below 2**53, so float64 sums of them are exact.

    Raises: ConfigError: no layers, layers of one name, an unknown kind, or a bad `fixed_cost`.
        FormatError: no formats, unknown or repeated ones.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        formats: Sequence[str | Format],
        kind: CostKind = "bops",
        *,
        fixed_cost: float = 0.0,
    ) -> None:
        if kind not in ("bops", "weight_bytes"):
            raise ConfigError(f"unknown kind of cost {kind!r}: use 'bops' or 'weight_bytes'")
        if not is_number(fixed_cost, 0):
            raise ConfigError(f"fixed_cost={fixed_cost!r} must be a finite number of at least 0")
        self.layers = tuple(layer for layer in layers if layer.quantizable)
        if not self.layers:
            raise ConfigError("a cost table needs at least one layer that can be quantized")
        self.formats = tuple(parse(fmt) for fmt in formats)
        self.kind: CostKind = kind
        in_fp32 = [layer for layer in layers if not layer.quantizable]
        self.fixed_cost = float(fixed_cost) + sum(self._layer(layer, None) for layer in in_fp32)
        _check_unique([layer.name for layer in self.layers])
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
        costs = [[[self._layer(layer, formats) for formats in row] for row in pairs] for layer in self.layers]
        self.table = torch.tensor(costs, dtype=torch.float64)
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
        return table[rows, weight_index, activation_index].sum(-1) + self.fixed_cost

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """`table` and the row numbers 0 … L−1 (int64) on `device`, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = (self.table.to(device), torch.arange(len(self.layers), device=device))
        return self._on_device[device]

    def of(self, allocation: Mapping[str, LayerFormats]) -> float:
        """Cost of an allocation, whose formats need not be among `formats`; layers it does not name are fp32.

        Raises: AllocationError: it names a layer that is not in the table.
        """
        return self.fixed_cost + sum(self._layer(layer, formats) for layer, formats in _pairs(self.layers, allocation))

    def uniform(self, fmt: str | Format) -> float:
        """Cost with all layers' weights and activations in one format, which need not be among `formats`."""
        return self.of(Allocation.uniform([layer.name for layer in self.layers], fmt))

    def uniform_bits(self, bits: float) -> float:
        """Cost of the uniform model of so many bits, which may be a fraction: 2.5 bits are MACs × 6.25 BOPs.

        Where the table has formats of that many bits, it is the cheapest of them (BF16 has no scales, INT16 has).

        Raises: TargetError: `bits` is no number between 0 and 32.
        """
        if not is_number(bits, 0, FP32_BITS):
            raise TargetError(f"bits={bits!r} must be a number between 0 and {FP32_BITS}")
        if exact := [fmt for fmt in self.formats if fmt.effective_bits == bits and not fmt.for_inputs_only]:
            return min(self.uniform(fmt) for fmt in exact)
        if self.kind == "bops":
            return self.fixed_cost + sum(layer.macs for layer in self.layers) * bits**2
        return self.fixed_cost + sum(
            layer.weight_numel * bits / 8 + layer.out_channels * SCALE_BYTES for layer in self.layers
        )

    @property
    def fp32(self) -> float:
        """Cost of the unquantized model."""
        return self.of({})

    @property
    def reachable(self) -> tuple[float, float]:
        """Cheapest and dearest allocation over `formats`, every layer and role free to choose."""
        flat = self.table.flatten(1)
        return float(flat.amin(1).sum()) + self.fixed_cost, float(flat.amax(1).sum()) + self.fixed_cost

    def _layer(self, layer: LayerInfo, formats: LayerFormats | None) -> int:
        return _bops(layer, formats) if self.kind == "bops" else _weight_bytes(layer, formats)


@dataclass(frozen=True)
class Target:
    """The cost that a search aims at.

    Attributes:
        kind: "bits" (the BOPs of the uniform model of so many bits; fractions allowed), "bops", "size_mb"
            (10**6 bytes of weights, with whatever the table's `fixed_cost` adds), or "ratio" (to the BOPs of the fp32
            model: 1/64 is 4 bits).
        value: in the unit of `kind`.
        cap: an upper limit, never exceeded; otherwise two-sided, met within 2 % either way.

    Raises: TargetError: an unknown kind, or a value that is no positive number, above 32 bits, or above a ratio of 1.
    """

    kind: TargetKind
    value: float
    cap: bool = False

    #: A two-sided target is met where |cost / target - 1| is at most this.
    TOLERANCE: ClassVar[float] = 0.02

    def __post_init__(self) -> None:
        limits = {"bits": float(FP32_BITS), "bops": math.inf, "size_mb": math.inf, "ratio": 1.0}
        if not (isinstance(self.kind, str) and self.kind in limits):
            raise TargetError(f"unknown kind of target {self.kind!r}: use {', '.join(limits)}")
        check_fields(self, TargetError, ["cap"])
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise TargetError(f"target_{self.kind}={self.value!r} must be a number")
        if not (is_number(self.value, 0, limits[self.kind]) and self.value):
            limit = f", at most {limits[self.kind]:g}" if math.isfinite(limits[self.kind]) else ""
            raise TargetError(f"target_{self.kind}={self.value!r} must be a positive number{limit}")

    @classmethod
    def of(
        cls,
        *,
        target_bits: float | None = None,
        target_bops: float | None = None,
        target_size_mb: float | None = None,
        target_ratio: float | None = None,
        cap: bool = False,
    ) -> Target:
        """From exactly one of the four arguments. Raises: TargetError: none, or several."""
        arguments: dict[TargetKind, float | None] = {
            "bits": target_bits,
            "bops": target_bops,
            "size_mb": target_size_mb,
            "ratio": target_ratio,
        }
        given = [(kind, value) for kind, value in arguments.items() if value is not None]
        if len(given) != 1:
            raise TargetError(
                f"give exactly one of {', '.join(f'target_{kind}' for kind in arguments)}, "
                f"not {' and '.join(f'target_{kind}={value!r}' for kind, value in given) or 'none'}"
            )
        kind, value = given[0]
        return cls(kind, value, cap)

    @property
    def label(self) -> str:
        """For names of folders and repositories, such as "bits-3.5" or "bops-1e09"."""
        return f"{self.kind}-{self.value:g}".replace("+", "")

    @property
    def cost_kind(self) -> CostKind:
        """The kind of cost table that this target is measured by."""
        return "weight_bytes" if self.kind == "size_mb" else "bops"

    def resolve(self, table: CostTable, reachable: tuple[float, float] | None = None) -> float:
        """The target in the unit of `table`.

        Args:
            reachable: cheapest and dearest cost of the search space; default: the table's own, which is the right
                one where every layer may take every format.
        Raises: TargetError: below the cheapest or above the dearest allocation; it gives the range in the unit of
            the target. ConfigError: a table of the wrong kind.
        """
        if table.kind != self.cost_kind:
            raise ConfigError(f"a target in {self.kind} needs a cost table of {self.cost_kind}, not of {table.kind}")
        wanted = self._to_cost(table)
        low, high = table.reachable if reachable is None else reachable
        slack = 1e-9 * high  # a ratio such as 1/64 is rounded when it is multiplied out
        if low - slack <= wanted <= high + slack:
            return min(max(wanted, low), high)
        problem, remedy = (
            ("below the cheapest", "raise it or allow formats of fewer bits")
            if wanted < low
            else ("above the dearest", "lower it or allow formats of more bits")
        )
        raise TargetError(
            f"target_{self.kind}={figure(self.value)} is {problem} allocation of the search space, which reaches from "
            f"{figure(self._from_cost(low, table))} to {figure(self._from_cost(high, table))}; {remedy}"
        )

    def is_met(self, cost: float, resolved: float) -> bool:
        """Whether `cost` meets the target whose cost `resolve` gave."""
        return cost <= resolved if self.cap else abs(cost / resolved - 1) <= self.TOLERANCE

    def _to_cost(self, table: CostTable) -> float:
        match self.kind:
            case "bits":
                return table.uniform_bits(self.value)
            case "bops":
                return float(self.value)
            case "size_mb":
                return self.value * 1e6
            case "ratio":
                return self.value * table.fp32

    def _from_cost(self, cost: float, table: CostTable) -> float:
        match self.kind:
            case "bits":
                return math.sqrt((cost - table.fixed_cost) / sum(layer.macs for layer in table.layers))
            case "bops":
                return cost
            case "size_mb":
                return cost / 1e6
            case "ratio":
                return cost / table.fp32


def _bops(layer: LayerInfo, formats: LayerFormats | None) -> int:
    if formats is None:
        return layer.macs * FP32_BITS**2
    inputs = FP32_BITS if formats.activation is None else formats.activation.effective_bits
    return round(layer.macs * formats.weight.effective_bits * inputs)


def _weight_bytes(layer: LayerInfo, formats: LayerFormats | None) -> int:
    if not layer.quantizable:
        return 0  # among `other_bytes`, in whatever type it has
    if formats is None:
        return layer.weight_numel * FP32_BITS // 8
    return formats.weight.storage_bytes((layer.out_channels, layer.weight_numel // layer.out_channels))


def _pairs(
    layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]
) -> list[tuple[LayerInfo, LayerFormats | None]]:
    names = _check_unique([layer.name for layer in layers])
    if unknown := [name for name in allocation if name not in names]:
        raise AllocationError(
            f"the allocation names {unknown[0]!r}, which is not among the {len(names)} layers whose cost is known"
        )
    if fixed := [layer.name for layer in layers if not layer.quantizable and layer.name in allocation]:
        raise AllocationError(
            f"the allocation names {fixed[0]!r}, which stays in fp32: it is no layer that can be quantized (leave it "
            "out, or name it in modules_to_not_convert)"
        )
    return [(layer, allocation.get(layer.name)) for layer in layers]


def _check_unique(names: Sequence[str]) -> set[str]:
    unique = set(names)
    if len(unique) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"layer {repeated!r} is listed more than once")
    return unique
