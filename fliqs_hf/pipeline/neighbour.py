"""The weights that the search for one target leaves to the search for the next."""

from __future__ import annotations

import copy
from typing import Any

from fliqs_hf.errors import CheckpointError
from fliqs_hf.nn import restore
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.training.state import load_state, save_state, states

#: Folder of the records where they wait, in fp32, until the next search is finished.
LATENT = "latent"


def keep(run: RunFolder, trained: Any) -> None:
    """Write the weights of a searchable model, unquantized. Raises: DiskError."""
    plain = copy.deepcopy(trained)
    restore(plain)
    run.claim(f"{LATENT}/")
    save_state(run.records / LATENT, 0, plain.state_dict(), {}, {}, {})


def neighbour(model: Any, before: RunFolder | None) -> Any:
    """A copy of the plain `model` with the weights that `keep` wrote to `before`; None without one.

    Raises: CheckpointError: they are not there, or damaged.
    """
    if before is None:
        return None
    folder, plain = before.records / LATENT, copy.deepcopy(model)
    try:
        found = states(folder)
        if not found:
            raise CheckpointError(f"{folder} is missing")
        load_state(found[-1], lambda weights, _: plain.load_state_dict(weights), {})
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} - the next search starts from these weights: search anew with --overwrite_output_dir, or "
            "without warm_start"
        ) from error
    return plain
