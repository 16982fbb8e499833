"""For every test of the recipe."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def new_accelerator() -> None:
    """Each run chooses its own mixed precision, which accelerate keeps for the whole process otherwise."""
    AcceleratorState._reset_state(reset_partial_state=True)
