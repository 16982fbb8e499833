"""`Allocation`: which format each layer's weights and inputs have. The one value that travels through everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fliqs_hf.errors import AllocationError, CheckpointError, FormatError
from fliqs_hf.files import write_text
from fliqs_hf.formats import BlockFormat, FloatFormat, Format, IntFormat, parse
from fliqs_hf.json_file import read_json


@dataclass(frozen=True)
class LayerFormats:
    """Formats of one layer. `activation=None` leaves the layer's input unquantized (weight-only quantization).

    Raises: FormatError: no formats (their names are for `LayerFormats.of`), or a weight with a zero point.
    """

    weight: Format
    activation: Format | None

    def __post_init__(self) -> None:
        for role, fmt in (("weight", self.weight), ("activation", self.activation)):
            if not (isinstance(fmt, (IntFormat, FloatFormat, BlockFormat)) or (fmt is None and role == "activation")):
                raise FormatError(f"{role}={fmt!r} is no format; names of formats are for LayerFormats.of")
        if self.weight.for_inputs_only:
            plain = self.weight.name.removesuffix("_zp")
            raise FormatError(f"weight={self.weight.name}: zero points are for inputs; take {plain} for weights")

    @classmethod
    def of(cls, weight: str | Format, activation: str | Format | None) -> LayerFormats:
        return cls(parse(weight), None if activation is None else parse(activation))

    def to_dict(self) -> dict[str, str | None]:
        return {"weight": self.weight.name, "activation": self.activation.name if self.activation else None}

    def __str__(self) -> str:
        return f"W {self.weight} / A {self.activation or 'fp32'}"


class Allocation(Mapping[str, LayerFormats]):
    """Layer name -> `LayerFormats`, immutable, in the order of the model. Layers it does not name stay as they are.

    Names are module names as `model.named_modules()` gives them.

    Raises: AllocationError: no mapping of layer names to `LayerFormats`; `from_dict` reads their dictionaries.
    """

    def __init__(self, layers: Mapping[str, LayerFormats]) -> None:
        if not isinstance(layers, Mapping):
            raise AllocationError(f"an allocation maps layer names to formats, it is not {layers!r}")
        for name, formats in layers.items():
            if not isinstance(name, str) or not name:
                raise AllocationError(f"{name!r} is no layer name: it must be a string, as named_modules() gives it")
            if not isinstance(formats, LayerFormats):
                raise AllocationError(f"allocation of {name!r}: {formats!r} is no LayerFormats; use from_dict")
        self._layers = dict(layers)

    @classmethod
    def uniform(
        cls, names: Iterable[str], weight: str | Format, activation: str | Format | None = "same"
    ) -> Allocation:
        """Every layer alike; `activation="same"` follows the weights.

        Raises: AllocationError: `names` is no list of names. FormatError: an unknown format.
        """
        if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
            raise AllocationError(f"names={names!r} must be a list of layer names")
        formats = LayerFormats.of(weight, weight if activation == "same" else activation)
        names = list(names)
        if odd := [name for name in names if not isinstance(name, str)]:
            raise AllocationError(f"names holds {odd[0]!r}, which is no layer name")
        return cls(dict.fromkeys(names, formats))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Allocation:
        """Inverse of `to_dict`.

        Raises: AllocationError: an entry is not `{"weight": name, "activation": name or null}`; it names the layer.
        """
        if not isinstance(data, Mapping):
            raise AllocationError(f"an allocation maps layer names to formats, it is not {data!r}")
        layers = {}
        for name, entry in data.items():
            if isinstance(entry, LayerFormats):
                layers[name] = entry
                continue
            if not isinstance(entry, Mapping) or set(entry) != {"weight", "activation"}:
                raise AllocationError(
                    f'allocation of {name!r}: expected {{"weight": …, "activation": …}}, got {entry!r}'
                )
            try:
                layers[name] = LayerFormats.of(entry["weight"], entry["activation"])
            except FormatError as error:
                raise AllocationError(f"allocation of {name!r}: {error}") from error
        return cls(layers)

    def to_dict(self) -> dict[str, dict[str, str | None]]:
        return {name: formats.to_dict() for name, formats in self._layers.items()}

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read `allocation.json`. Raises: AllocationError: unreadable, or not an allocation."""
        if not isinstance(path, (str, Path)):
            raise AllocationError(f"an allocation is read from a path, not from {path!r}")
        try:
            return cls.from_dict(read_json(path))
        except (CheckpointError, AllocationError) as error:
            raise AllocationError(f"cannot read the allocation {str(path)!r}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Complete, or as it was. Raises: DiskError."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def __getitem__(self, name: str) -> LayerFormats:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        return f"Allocation({len(self)} layers: {self.summary()})"

    def summary(self) -> str:
        """Formats with the number of layers that have them, most frequent first."""
        counts: dict[str, int] = {}
        for formats in self._layers.values():
            counts[str(formats)] = counts.get(str(formats), 0) + 1
        return ", ".join(f"{count} × {key}" for key, count in sorted(counts.items(), key=lambda item: -item[1]))
