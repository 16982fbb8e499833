"""Writing a run as a whole: until it is complete, what is in its folder stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fliqs_hf.files import disk_errors, flush_all, move_into, remove
from fliqs_hf.runs.files import DRAFT, MODEL_CONFIG, RECORD, RUN, RunFiles


@contextmanager
def replacing_run(files: RunFiles) -> Iterator[Path]:
    """A folder of the same name to make a run in, which takes the place of all that is ours when the block ends.

    The model's configuration, without which nothing loads, goes first and comes last: at any moment there is the old
    run, the new one, or none; and what is left where that breaks off is no work that would be in the way.

    Raises: DiskError: the old run is there, or none. ConfigError: something in the way is not ours.
    """
    files.check()
    fresh = not files.listed()
    whole = files.path / DRAFT
    draft = whole / files.path.resolve().name
    with disk_errors(files.path):
        files.add({MODEL_CONFIG})  # without a record, the draft of a process that was killed would not be ours
        try:
            remove(whole)
            draft.mkdir(parents=True)
            yield draft
            flush_all(draft)
            _move(draft, files)
        except BaseException:
            if fresh:
                files.clear()
            raise
        finally:
            with suppress(OSError):  # the next run that is written removes it
                remove(whole)


def _move(draft: Path, files: RunFiles) -> None:
    """Put the run in `draft` where that of `files` is."""
    new, old, runs = RunFiles(draft).listed(), files.listed(), files.runs()
    files.check(*new)
    files.add(new)
    files.discard(MODEL_CONFIG)
    for run in runs:
        run.clear()
    for entry in sorted(old - new):
        files.discard(entry.removesuffix("/"))
    files.add(new)
    move_into(files.path / RUN, draft / RUN, last=RECORD)
    (draft / RUN).rmdir()
    move_into(files.path, draft, last=MODEL_CONFIG)
