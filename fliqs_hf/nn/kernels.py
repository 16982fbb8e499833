"""Which kernels the packed layers of a model run with, and choosing."""

from __future__ import annotations

import os
from typing import cast, get_args

from torch import nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.native import Choice, Kernels, WeightCache
from fliqs_hf.nn.swap import packed_layers

#: For operators: takes the place of "auto", in every program.
ENVIRONMENT = "FLIQS_KERNELS"


def check_kernels(source: str, value: object) -> None:
    """Raises: ConfigError: `value`, which `source` gave, is none of `Kernels`."""
    _check(source, value, get_args(Kernels))


def check_weight_cache(value: object) -> None:
    """Raises: ConfigError: `value` is none of `WeightCache`."""
    _check("weight_cache", value, get_args(WeightCache))


def _check(source: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{source}={value!r} does not exist; choose from {', '.join(map(repr, allowed))}")


def set_kernels(model: nn.Module, kernels: Kernels = "auto", weight_cache: WeightCache = "decoded") -> None:
    """Choose how the packed layers of `model` run in inference, in place.

    Args:
        kernels: "auto" for the fastest kernel that each layer has on this machine, or "reference" for the path that
            equals the searchable model bit for bit. The environment variable FLIQS_KERNELS replaces "auto".
        weight_cache: "decoded" keeps the float32 weight of a layer that no exact product takes; "none" decodes it in
            every forward pass, which takes up to twice the time and no memory.
    Raises: ConfigError: neither of them.
    """
    check_kernels("kernels", kernels)
    check_weight_cache(weight_cache)
    if kernels == "auto" and (value := os.environ.get(ENVIRONMENT)):
        check_kernels(ENVIRONMENT, value)
        kernels = cast(Kernels, value)
    for layer in packed_layers(model).values():
        layer.choose_kernels(kernels, weight_cache)


def kernels_of(model: nn.Module) -> dict[str, Choice]:
    """Layer name -> the kernel that it runs with in inference, and why."""
    return {name: layer.kernel for name, layer in packed_layers(model).items()}
