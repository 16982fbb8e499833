"""The records that later commands read from a run folder: typed, with a version, written and read by one class each.

A version is raised when a record changes so that earlier readers would misunderstand it. Records without a version, as
they were written before there was one, are of version 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from fliqs_hf import checksums
from fliqs_hf.checks import check_fields
from fliqs_hf.errors import CheckpointError
from fliqs_hf.json_file import parse_object, read_text

_VERSION = "format_version"


@dataclass(frozen=True)
class Record:
    """One JSON object."""

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is None is left out."""
        return {_VERSION: self.version, **{key: value for key, value in asdict(self).items() if value is not None}}

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str | Path) -> Self:
        """Inverse of `to_dict`. A checksum is not compared: see `checksums.unsealed`.

        Args: source: what `data` was read from, for messages.
        Raises: CheckpointError: of a later version, an entry that does not exist or of another type.
        """
        values = {key: value for key, value in data.items() if key not in (_VERSION, checksums.KEY)}
        version = data.get(_VERSION, 1)
        if type(version) is not int or not 1 <= version <= cls.version:
            raise CheckpointError(
                f"{source} has {_VERSION}={version!r:.60}, and this version of fliqs_hf reads 1 to {cls.version}: "
                "update fliqs_hf, or write the record again"
            )
        values = cls._entries(values)
        if unknown := sorted(values.keys() - {each.name for each in fields(cls)}):
            raise CheckpointError(f"{source} has an entry {unknown[0]!r:.60}, which this record does not know")
        try:
            record = cls(**values)
            check_fields(record, CheckpointError)
        except (TypeError, CheckpointError) as error:
            raise CheckpointError(f"{source} holds a value of another type, or lacks one: {error}") from error
        return record

    @classmethod
    def _entries(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Fields of the record, by name, from the entries in a file."""
        return values

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """From the folder of records; None where there is none. Raises: CheckpointError: unreadable, or see `of`."""
        file = folder / cls.name
        return cls.of(parse_object(read_text(file), file), file) if file.exists() else None


@dataclass(frozen=True)
class RunSettings(Record):
    """What a run was told to do.

    Attributes:
        arguments: by name, as the recipe or the command has them; in the file they stand beside the rest.
        search: of a `SearchConfig`, where weights were trained; None where they were not.
        command: as it was typed, whole or in words.
        versions: of what the result depends on.
    """

    name = "settings.json"
    arguments: dict[str, Any] = field(default_factory=dict)
    search: dict[str, Any] | None = None
    command: str | list[str] | None = None
    versions: dict[str, str] | None = None

    @property
    def told(self) -> dict[str, Any]:
        """The arguments, and the settings of the search."""
        return {**self.arguments, **({} if self.search is None else {"search": self.search})}

    def to_dict(self) -> dict[str, Any]:
        rest = super().to_dict()
        return {_VERSION: rest.pop(_VERSION), **rest.pop("arguments"), **rest}

    @classmethod
    def _entries(cls, values: dict[str, Any]) -> dict[str, Any]:
        own: dict[str, Any] = {key: values.pop(key) for key in ("search", "command", "versions") if key in values}
        return {"arguments": values, **own}


@dataclass(frozen=True)
class RunResults(Record):
    """What came of a run; written last.

    Attributes:
        target: kind -> value, as `Target` has kinds; of a search also its "cost" and "cap".
        cost: of the allocation and of fp32, by name, and the part of the target that is used.
        accuracy: model -> `training.Accuracy.to_dict()`.
        checkpoint_bytes, fp32_bytes: of the weight files, and of the weights before.
        seconds: of training. sensitivity_seconds: of the scores that it began with.
        hardware: the profile that was chosen, and where the bit operations run there: `cost.hardware.HardwareShare`.
        floor: of accuracy on held-out images, and every model that was tested, most precise first.
        repaired: whether the policy's most likely formats missed the target, at `argmax_cost_ratio` of it.
    """

    name = "results.json"
    target: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    checkpoint_bytes: int | None = None
    fp32_bytes: int | None = None
    seconds: float | None = None
    seconds_per_step: float | None = None
    sensitivity_seconds: float | None = None
    repaired: bool | None = None
    argmax_cost_ratio: float | None = None
    hardware: dict[str, Any] | None = None
    floor: dict[str, Any] | None = None


@dataclass(frozen=True)
class SensitivityScores(Record):
    """The scores that a search began with.

    Attributes:
        scores: decision -> expected increase of the loss by each of its formats.
        images: that they were measured on, in `passes` passes.
    """

    name = "sensitivity.json"
    method: str
    images: int
    passes: int
    seconds: float
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class MeasuredAlternatives(Record):
    """What the mean loss of the delivered model changes by when one decision takes another format.

    Attributes:
        images: held-out ones that it was measured on, in pairs, in `seconds`.
        changes: decision -> format -> the fields of a `selection.changes.Change`.
    """

    name = "alternatives.json"
    images: int
    seconds: float
    changes: dict[str, dict[str, dict[str, float | bool]]]


@dataclass(frozen=True)
class PolicyStep(Record):
    """One line of the history of the policy: decision -> probability of each of its formats after `step` steps."""

    name = "policy.jsonl"
    step: int
    probabilities: dict[str, list[float]]

    @classmethod
    def history(cls, folder: Path) -> list[Self]:
        """All lines; empty where there is no record. Raises: CheckpointError: see `Record.read`."""
        file = folder / cls.name
        lines = read_text(file).splitlines() if file.exists() else []
        return [cls.of(parse_object(line, file), file) for line in lines if line]
