"""Time as a cost: a table of layers and formats, measured on a device or estimated from its profile."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.checks import is_number, is_whole
from fliqs_hf.cost.models import Cost, register, registered, unregister
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import CheckpointError, ConfigError, FormatError
from fliqs_hf.files import write_text
from fliqs_hf.formats import parse
from fliqs_hf.json_file import parse_object, read_text
from fliqs_hf.wording import short

NAME = "latency_ms"
#: The row of what a model takes beside its layers.
BETWEEN = "(between the layers)"
FP32 = "fp32"


@dataclass(frozen=True)
class LatencyRow:
    """One layer in one pair of formats, or in fp32, or what is between the layers.

    Attributes:
        macs, weight_numel, out_channels: as in `LayerInfo`: a table of another model is recognised by them.
        ms: of one forward pass over a batch, the median of rounds; low_ms, high_ms: their quartiles.
        kernel: what ran, "roofline" for an estimate.
    """

    layer: str
    weight: str
    activation: str
    ms: float
    low_ms: float
    high_ms: float
    kernel: str = ""
    macs: int = 0
    weight_numel: int = 0
    out_channels: int = 0

    def __post_init__(self) -> None:
        for name in ("ms", "low_ms", "high_ms"):
            if not is_number(value := getattr(self, name), 0):
                raise ConfigError(f"{name}={value!r} of {self.layer!r} must be a finite number of at least 0")
        for name in ("macs", "weight_numel", "out_channels"):
            if not is_whole(value := getattr(self, name), 0):
                raise ConfigError(f"{name}={value!r} of {self.layer!r} must be a whole number")


def names_of(formats: LayerFormats | None) -> tuple[str, str]:
    """How a table calls the formats of a layer."""
    return (FP32, FP32) if formats is None else (formats.weight.name, str(formats.activation or FP32))


@dataclass(frozen=True)
class LatencyTable:
    """Times of the layers of one model on one device.

    Attributes:
        conditions: device, batch_size, whether it is `estimated`, and what else is known of how it was made.

    Raises: ConfigError: no rows, two of one layer and formats, none of what is between the layers, or conditions that
        are none.
    """

    rows: tuple[LatencyRow, ...]
    conditions: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.conditions, Mapping):
            raise ConfigError(f"the conditions of a latency table are an object, not {self.conditions!r:.60}")
        if not is_whole(batch := self.conditions.get("batch_size", 1), 1):
            raise ConfigError(f"batch_size={batch!r} of a latency table must be a whole number, at least 1")
        if not isinstance(estimated := self.conditions.get("estimated", False), bool):
            raise ConfigError(f"estimated={estimated!r} of a latency table must be true or false")
        keys = [(row.layer, row.weight, row.activation) for row in self.rows]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"a latency table has {twice[0]} in {twice[1]} × {twice[2]} more than once")
        if sum(row.layer == BETWEEN for row in self.rows) != 1 or len(self.rows) < 2:
            raise ConfigError(f"a latency table has rows of layers, and one of the layer {BETWEEN!r}")

    @property
    def between_ms(self) -> float:
        return next(row.ms for row in self.rows if row.layer == BETWEEN)

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Formats of weights and inputs that all layers have times of, by name."""
        found = {(row.weight, row.activation) for row in self.rows if row.layer != BETWEEN}
        layers = {row.layer for row in self.rows}
        keys = {(row.layer, row.weight, row.activation) for row in self.rows}
        return {pair for pair in found if all((layer, *pair) in keys for layer in layers - {BETWEEN})}

    @property
    def label(self) -> str:
        """Of its times: what they are of, and whether they were measured."""
        batch = self.conditions.get("batch_size", 1)
        how = "estimated" if self.conditions.get("estimated") else "measured"
        return f"ms, batch {batch}, {how}"

    def cost(self) -> Cost:
        """`latency_ms`: the sum of the layers' times, and what is between them."""
        times = {(row.layer, row.weight, row.activation): row.ms for row in self.rows}

        def of_layer(layer: LayerInfo, formats: LayerFormats | None) -> float | None:
            if not layer.quantizable:
                return 0.0  # among what is between the layers
            return times.get((layer.name, *names_of(formats)))

        return Cost(NAME, self.label, of_layer, beside=self.between_ms, show=short)

    def check(self, layers: Sequence[LayerInfo]) -> None:
        """Raises: ConfigError: it was made for other layers."""
        known = {row.layer: (row.macs, row.weight_numel, row.out_channels) for row in self.rows}
        for layer in layers:
            if not layer.quantizable:
                continue
            shape = (layer.macs, layer.weight_numel, layer.out_channels)
            if known.get(layer.name) != shape:
                found = "is not in it" if layer.name not in known else "has another shape there"
                raise ConfigError(
                    f"the latency table is of another model: {layer.name} {found}; make one with fliqs-hf profile"
                )

    def save(self, path: str | Path) -> None:
        """As JSON, or as CSV where the name ends so; the latter without most of the conditions. Raises: DiskError."""
        rows = [asdict(row) for row in self.rows]
        if Path(path).suffix == ".csv":
            kept = {key: self.conditions.get(key) for key in ("device", "batch_size", "estimated")}
            text = io.StringIO()
            writer = csv.DictWriter(text, [*_COLUMNS, *kept], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **kept} for row in rows)
            write_text(path, text.getvalue())
        else:
            write_text(path, json.dumps({"conditions": dict(self.conditions), "latencies": rows}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Raises: ConfigError: unreadable, or no such table; it names the row."""
        try:
            text = read_text(path)
            if Path(path).suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))  # with which Excel begins
                first = rows[0] if rows else {}
                conditions: dict[str, Any] = {"device": first.get("device")}
                conditions["batch_size"] = int(first.get("batch_size") or 1)
                said = (first.get("estimated") or "False").strip().lower()
                conditions["estimated"] = {"true": True, "false": False}.get(said, said)
            else:
                data = parse_object(text, path)
                rows, conditions = data["latencies"], data["conditions"]
            return cls(tuple(_rows(rows)), conditions)
        except (CheckpointError, ConfigError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise ConfigError(f"{str(path)!r} is no latency table as fliqs-hf profile writes it: {error}") from error


_COLUMNS = tuple(field.name for field in fields(LatencyRow))


def _rows(rows: Iterable[Mapping[str, Any]]) -> Iterable[LatencyRow]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ConfigError(f"row {number} is {row!r:.60}, not an object")
        if missing := [name for name in ("layer", "weight", "activation", "ms") if row.get(name) in (None, "")]:
            raise ConfigError(f"row {number} has no {missing[0]}")
        ms, low, high = (float(row.get(name) or row["ms"]) for name in ("ms", "low_ms", "high_ms"))
        shape = [int(row.get(name) or 0) for name in ("macs", "weight_numel", "out_channels")]
        try:
            weight, inputs = (FP32 if row[s] == FP32 else parse(row[s]).name for s in ("weight", "activation"))
        except FormatError as error:
            raise ConfigError(f"row {number}: {error}") from error
        yield LatencyRow(
            str(row["layer"]), weight, inputs, ms, low, high, str(row.get("kernel") or ""), *shape,
        )  # fmt: skip


def use(table: LatencyTable) -> Cost:
    """Register its times as the cost "latency_ms", in the place of those of an earlier table."""
    if any(cost.name == NAME for cost in registered()):
        unregister(NAME)
    return register(table.cost())
