"""Costs as small objects: a name, a unit and a number for each layer in its formats. Others register their own.

A layer that the allocation does not name runs in fp32 on both sides; an activation of `None` is fp32 too. Both count
as 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import AllocationError, ConfigError
from fliqs_hf.wording import engineering, size

FP32_BITS = 32
SCALE_BYTES = 4  # one float32 per output channel


@dataclass(frozen=True)
class Cost:
    """What a layer costs in its formats; the cost of a model is the sum over its layers, `beside`, and the highest
    `peak`.

    Attributes:
        name: of the cost in records and of its targets, such as "energy_uj": a word of Python, its unit at the end.
        unit: in words, as headings of tables give it.
        of_layer: cost of a layer, at least 0 and finite, or None where it is not known, as in a table of measured
            formats. The formats are None for a layer in fp32.
        at_bits: cost of layers whose weights and inputs all have so many bits, which may be a fraction; without it
            there are no uniform models between formats.
        of_file: counts bytes of the packed file; what is beside the layers in it counts too.
        beside: what a model costs beside its layers, whatever their formats.
        peak: what a layer takes on top only while it runs, as `of_layer`; of a model the largest of them counts.
        show: a value as people read it.
        symbol: follows a change of so much, such as "B".
    """

    name: str
    unit: str
    of_layer: Callable[[LayerInfo, LayerFormats | None], float | None]
    at_bits: Callable[[Sequence[LayerInfo], float], float] | None = None
    of_file: bool = False
    beside: float = 0.0
    peak: Callable[[LayerInfo, LayerFormats | None], float | None] | None = None
    show: Callable[[float], str] = engineering
    symbol: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isidentifier()):
            raise ConfigError(f"the name of a cost is a word such as 'energy_uj', not {self.name!r}")

    def layer(self, layer: LayerInfo, formats: LayerFormats | None) -> float:
        """Cost of one layer, its peak left out. Raises: ConfigError: it is not known, or no cost."""
        return self._checked(self.of_layer(layer, formats), layer, formats)

    def peak_of(self, layer: LayerInfo, formats: LayerFormats | None) -> float:
        """What one layer takes on top while it runs; 0 without `peak`. Raises: as `layer`."""
        return 0.0 if self.peak is None else self._checked(self.peak(layer, formats), layer, formats)

    def _checked(self, value: float | None, layer: LayerInfo, formats: LayerFormats | None) -> float:
        if value is None:
            raise ConfigError(
                f"{self.name} of {layer.name} in {formats or 'fp32'} is not known; leave that format out"
            )
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            raise ConfigError(
                f"cost {self.name!r} of {layer.name} in {formats or 'fp32'} is {value!r}; it must be a finite number "
                "of at least 0"
            )
        return value

    def of(self, layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]) -> float:
        """Cost of a model. Raises: AllocationError: the allocation names a layer that is not among `layers`."""
        pairs = paired(layers, allocation)
        highest = max((self.peak_of(*pair) for pair in pairs), default=0.0)
        return self.beside + sum(self.layer(*pair) for pair in pairs) + highest

    def known(self, layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]) -> float | None:
        """As `of`, None where that of a layer is not known."""
        pairs = paired(layers, allocation)
        unknown = any(
            self.of_layer(*pair) is None or (self.peak is not None and self.peak(*pair) is None) for pair in pairs
        )
        return None if unknown else self.of(layers, allocation)

    def shown(self, value: float | None) -> str:
        """A value as people read it, or a dash where it is not known."""
        return "–" if value is None else self.show(value)


def known_costs(layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]) -> dict[str, float | None]:
    """Every registered cost of a model, by the name of the cost; None where it is not known."""
    return {cost.name: cost.known(layers, allocation) for cost in registered()}


#: Names of the costs that come with the package.
OWN = ("bops", "weight_bytes", "energy_uj", "memory_bytes")
_COSTS: dict[str, Cost] = {}


def register(cost: Cost) -> Cost:
    """Make a cost known: `target_<name>` then exists, and estimates, results, report and card list it.

    Returns: `cost`. Raises: ConfigError: another one of this name is registered.
    """
    if _COSTS.setdefault(cost.name, cost) != cost:
        raise ConfigError(f"a cost {cost.name!r} is registered already: choose another name, or unregister it")
    return cost


def unregister(name: str) -> None:
    """Forget a registered cost. Raises: ConfigError: it is none, or one of the package's own."""
    if name not in _COSTS or name in OWN:
        raise ConfigError(f"{name!r} is no cost that was registered from outside")
    del _COSTS[name]


def registered() -> tuple[Cost, ...]:
    """All known costs, BOPs and bytes first."""
    return tuple(_COSTS.values())


def find(kind: str | Cost) -> Cost:
    """A cost by its name. Raises: ConfigError: there is none."""
    if isinstance(kind, Cost):
        return kind
    if not (isinstance(kind, str) and kind in _COSTS):
        raise ConfigError(f"unknown kind of cost {kind!r}: use {' or '.join(map(repr, _COSTS))}")
    return _COSTS[kind]


def bops(layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]) -> int:
    """Bit operations per image: sum over layers of MACs × weight bits × activation bits, which include an element's
    share of the scales in formats of blocks (MXFP4: 4.25), rounded to a whole number in each layer.

    Raises: AllocationError: the allocation names a layer that is not among `layers`.
    Source: FLIQS (Dotzel et al. 2024), section 3, cost model C(a).
    """
    return sum(_bops(layer, formats) for layer, formats in paired(layers, allocation))


def weight_bytes(layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats], *, other_bytes: int = 0) -> int:
    """Bytes of the packed weights with their scales, one float32 per output channel (the default granularity) where
    the format is scaled, or with those of its blocks.

    Biases and everything else that is not the weight of one of `layers`, and layers of kind "fp32", are not included;
    give them as `other_bytes` (`unlisted_bytes(model, layers)`) for the size of the checkpoint.

    Raises: AllocationError: the allocation names a layer that is not among `layers`.
    """
    return other_bytes + sum(_weight_bytes(layer, formats) for layer, formats in paired(layers, allocation))


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


def _working_bytes(layer: LayerInfo, formats: LayerFormats | None) -> int | None:
    """The layer's input in its format and its output in float32, of one image."""
    if not layer.input_numel:
        return None if layer.quantizable else 0  # a record from before inputs were traced, or products of no module
    inputs = FP32_BITS if formats is None or formats.activation is None else formats.activation.effective_bits
    return math.ceil(layer.input_numel * inputs / 8) + layer.output_numel * FP32_BITS // 8


def paired(
    layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]
) -> list[tuple[LayerInfo, LayerFormats | None]]:
    """Each layer with its formats. Raises: AllocationError: the allocation names what is no layer to quantize."""
    names = check_unique([layer.name for layer in layers])
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


def check_unique(names: Sequence[str]) -> set[str]:
    """Raises: ConfigError: a layer that is listed more than once."""
    unique = set(names)
    if len(unique) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"layer {repeated!r} is listed more than once")
    return unique


def _uniform_bops(layers: Sequence[LayerInfo], bits: float) -> float:
    return sum(layer.macs for layer in layers) * bits**2


def _uniform_bytes(layers: Sequence[LayerInfo], bits: float) -> float:
    return sum(layer.weight_numel * bits / 8 + layer.out_channels * SCALE_BYTES for layer in layers)


BOPS = register(Cost("bops", "BOPs per image", _bops, _uniform_bops))
WEIGHT_BYTES = register(
    Cost("weight_bytes", "weights", _weight_bytes, _uniform_bytes, of_file=True, show=size, symbol="B")
)
#: Weights all at once, and the largest input and output of a layer: what a runtime needs that reuses its buffers.
MEMORY = register(
    Cost(
        "memory_bytes",
        "weights and activations",
        _weight_bytes,
        of_file=True,
        peak=_working_bytes,
        show=size,
        symbol="B",
    )
)
