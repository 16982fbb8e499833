"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """After this context each module is in the mode, training or evaluation, that it was in before."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within this context, and afterwards the mode that each module was in."""
    with modes_kept(model):
        model.eval()
        yield
