"""Which kernels the packed layers of a model run with, and choosing."""

from __future__ import annotations

import os
from typing import cast, get_args

from torch import nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.native import Choice, Kernels
from fliqs_hf.nn.swap import packed_layers

#: For operators: takes the place of "auto", in every program.
ENVIRONMENT = "FLIQS_KERNELS"


def check_kernels(source: str, value: object) -> None:
    """Raises: ConfigError: `value`, which `source` gave, is none of `Kernels`."""
    if value not in get_args(Kernels):
        raise ConfigError(f"{source}={value!r} does not exist; choose from {', '.join(map(repr, get_args(Kernels)))}")


def set_kernels(model: nn.Module, kernels: Kernels = "auto") -> None:
    """Choose how the packed layers of `model` run in inference, in place.

    Args:
        kernels: "auto" for the fastest kernel that each layer has on this machine, or "reference" for the path that
            equals the searchable model bit for bit. The environment variable FLIQS_KERNELS replaces "auto".
    Raises: ConfigError: neither of them.
    """
    check_kernels("kernels", kernels)
    if kernels == "auto" and (value := os.environ.get(ENVIRONMENT)):
        check_kernels(ENVIRONMENT, value)
        kernels = cast(Kernels, value)
    for layer in packed_layers(model).values():
        layer.kernels = kernels


def kernels_of(model: nn.Module) -> dict[str, Choice]:
    """Layer name -> the kernel that it runs with in inference, and why."""
    return {name: layer.kernel for name, layer in packed_layers(model).items()}
