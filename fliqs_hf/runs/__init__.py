"""The run folder, a model folder and a Hub repository as well: its layout, its records, what is ours in it."""

from fliqs_hf.runs.files import RunFiles, is_run, locked_run
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.runs.folder import RunFolder

__all__ = ["FinishedRun", "RunFiles", "RunFolder", "is_run", "locked_run"]
