"""Compiled training steps: which backends there are, and whether one works on this machine."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import nn

from fliqs_hf.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_BACKEND = "inductor"


def check_backend(name: str) -> None:
    """Raises: ConfigError: `torch.compile` has no such backend."""
    there = torch.compiler.list_backends(exclude_tags=())
    if name not in there:
        raise ConfigError(
            f"torch_compile_backend={name!r} does not exist; choose from {', '.join(torch.compiler.list_backends())}"
        )


@cache
def can_compile(backend: str, device: str) -> bool:
    """Whether `backend` compiles for `device` ("cpu", "cuda"), found by compiling one line; says so once if not.

    What is missing may be a compiler, its headers or those of Python, or Triton: only trying tells.
    """

    def double(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        torch.compile(double, backend=backend)(torch.ones(4, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # of a backend: all others are RuntimeErrors
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        logger.warning(
            "torch_compile: the backend %s does not work here for %s (%s), so steps are not compiled; install what "
            "it needs, such as g++ and Python's headers, and start again",
            backend, device, reason,
        )  # fmt: skip
        return False
    return True


def compiled(model: nn.Module, backend: str, device: torch.device) -> nn.Module:
    """`model` for training, compiled at its first steps; `model` itself where nothing compiles.

    Every batch has the same shape, so none is made symbolic.
    """
    if not can_compile(backend, device.type):
        return model
    return torch.compile(model, backend=backend, dynamic=False)  # type: ignore[return-value]  # a module, as `model` is
