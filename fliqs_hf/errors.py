"""Typed errors. Each message names the bad value and the remedy."""

from collections.abc import Iterable
from difflib import get_close_matches


class FliqsError(Exception):
    """Base class of every error that fliqs_hf raises on purpose."""


class FormatError(FliqsError, ValueError):
    """A number format, code or scale that does not exist or does not fit."""


class AllocationError(FliqsError, ValueError):
    """An allocation that does not match the model, or cannot be read."""


class ConfigError(FliqsError, ValueError):
    """A setting that is unknown, malformed or contradicts another."""


class TargetError(FliqsError, ValueError):
    """A cost target that no allocation of the search space can meet."""


class DataError(FliqsError, ValueError):
    """An image, label or split that cannot be used."""


class CheckpointError(FliqsError, RuntimeError):
    """A checkpoint that is missing, damaged, foreign or of another version."""


class TrainingError(FliqsError, RuntimeError):
    """Training that cannot go on, such as a loss that is not finite."""


class DiskError(TrainingError):
    """A file or folder that cannot be written, with the reason that the system gave."""


class BusyError(FliqsError, RuntimeError):
    """A folder that another process is writing to."""


class FloorError(FliqsError, RuntimeError):
    """A floor of accuracy that no allocation met."""


class ExportError(FliqsError, RuntimeError):
    """An exported model that does not answer as the model that it was made from."""


class HubError(FliqsError, RuntimeError):
    """The Hub refused a request, or could not be reached."""


class DependencyError(FliqsError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `name` may be a typo of."""
    return next(iter(get_close_matches(name, list(known), 1)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", or "; " and `otherwise`, if anything."""
    close = nearest(name, known)
    hint = otherwise if close is None else f"did you mean {close!r}?"
    return hint and f"; {hint}"
