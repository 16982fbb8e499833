"""What a program says when it stops by an error: one line, an exit status, and a traceback for who asks for it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from fliqs_hf.errors import CheckpointError, DependencyError, ExportError, FliqsError, FloorError
from fliqs_hf.interrupt import stopping
from fliqs_hf.optional import install_hint

#: Set to 1, it has every error print its traceback.
TRACEBACK = "FLIQS_HF_TRACEBACK"
_PACKAGE = Path(__file__).parent


def explain(error: BaseException) -> tuple[str, int]:
    """One line, and the exit status: that of the signal that interrupted, 1 a checkpoint that is not whole, an
    export that answers otherwise or a floor that is not met, else 2.

    Typed errors speak for themselves. Of any other the line says where it came from: one that a library raised may be
    due to its input, one that this package raised is a mistake of ours.
    """
    text = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return text or "interrupted", getattr(error, "status", 130)
    if isinstance(error, ImportError) and not isinstance(error, DependencyError):
        return f"DependencyError: this needs {install_hint(error)}", 2
    if isinstance(error, (FliqsError, OSError)):
        return f"{kind}: {text}", 1 if isinstance(error, (CheckpointError, ExportError, FloorError)) else 2
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "not enough memory" in text.lower():
        return f"{kind}: {text}; use smaller batches or images", 2
    return f"{kind}: {text or 'no message'} ({_origin(error)})", 2


def trace(error: BaseException) -> str:
    """The traceback, if `FLIQS_HF_TRACEBACK=1` asks for it, else nothing."""
    return "".join(traceback.format_exception(error)) if os.environ.get(TRACEBACK) == "1" else ""


def status_of(job: Callable[[], object], advice: str) -> int:
    """Run a job as a program of its own: errors are one line on stderr.

    Args: advice: what to do after it was stopped, as in `interrupt.stopping`.
    Returns: the exit status: 0, that of `explain`, or 128 + number of the signal that stopped it.
    """
    try:
        with stopping(advice):
            job()
    except (Exception, KeyboardInterrupt) as error:  # whatever it is: a program owes its user a sentence
        message, status = explain(error)
        print(f"{trace(error)}{message}", file=sys.stderr)
        return status
    return 0


def _origin(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = Path(frames[-1].filename) if frames else _PACKAGE
    if place.is_relative_to(_PACKAGE):
        return (
            f"this looks like a bug of fliqs_hf in {place.relative_to(_PACKAGE).as_posix()}:"
            f"{frames[-1].lineno if frames else 0}: please report it with the traceback that {TRACEBACK}=1 prints"
        )
    parts = place.with_suffix("").parts
    library = parts[parts.index("site-packages") + 1] if "site-packages" in parts else place.stem
    return (
        f"raised by {library}; check the model, data and arguments that it was given. {TRACEBACK}=1 prints the "
        "traceback; if they are sound, please report it"
    )
