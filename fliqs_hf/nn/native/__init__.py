"""Fast kernels for packed layers, chosen per layer, beside the reference path, which decodes the weight.

**Numerics.** Codes and scales of weights and inputs are those of the reference path. The products of codes are summed
in 32-bit integers, exactly; the sum S is then rounded to float32 once and multiplied by the two scales w and s. With
bias b, the result lies within 3 u |S w s| + u |S w s + b| of the real number S w s + b, to first order in u = 2**-24,
whatever the batch and the number of threads. (The reference path rounds every partial sum instead, so its error grows
with the number of input features.) Layers are equal to that bound, but models not bit for bit: a value on the
midpoint of two codes may be rounded the other way in the next layer, as by any other change of arithmetic.

On CUDA devices the same holds for integers. Products of E4M3 are summed with the fewer bits of the device's FP8 units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from fliqs_hf.nn.native.choice import Choice, Kernels, WeightCache, choose
from fliqs_hf.nn.native.cuda import CudaProduct
from fliqs_hf.nn.native.decoded import DecodedProduct
from fliqs_hf.nn.native.int8 import Int8Product

if TYPE_CHECKING:
    from fliqs_hf.nn.packed import PackedLayer

__all__ = ["Choice", "Kernel", "Kernels", "Native", "WeightCache", "choose", "compiled_kernel"]

#: What computes one packed layer: the layer and its input in, its output out.
Kernel = Callable[["PackedLayer", Tensor], Tensor]
_KERNELS: dict[tuple[str, str], Callable[[PackedLayer], Kernel]] = {
    ("cpu", "int8"): Int8Product,
    ("cuda", "int8"): CudaProduct,
    ("cuda", "fp8"): CudaProduct,
    ("cpu", "decoded"): DecodedProduct,
    ("cuda", "decoded"): DecodedProduct,
}


class Native:
    """The kernel of one layer, made for the codes and scales that it has now."""

    def __init__(self, layer: PackedLayer) -> None:
        self.choice, self.device = choose(layer), layer.weight_codes.device
        self._source = _state(layer)
        self._kernel: Kernel | None = None

    def is_of(self, layer: PackedLayer) -> bool:
        """Whether nothing has been written to the layer's codes or scales since."""
        buffers = layer._buffers
        for name, part, version in self._source:
            if buffers[name] is not part or (part is not None and version is not None and part._version != version):
                return False
        return True

    def kernel(self, layer: PackedLayer) -> Kernel | None:
        """What computes the layer; None for the reference path."""
        if self._kernel is None:  # not while a model is loaded
            make = _KERNELS.get((self.device.type, self.choice.kernel))
            self._kernel = make(layer) if make else None
        return self._kernel


def compiled_kernel(layer: PackedLayer) -> Kernel | None:
    """What computes the layer where `torch.compile` traces it; None for the reference path."""
    if layer.weight_codes.device.type != "cuda" or choose(layer).kernel not in ("int8", "fp8"):
        return None
    return CudaProduct(layer)


def _state(layer: PackedLayer) -> list[tuple[str, Tensor | None, int | None]]:
    """The buffers that a weight is made of, and how often each has been written to, None where nothing tells."""
    parts = {name: layer._buffers[name] for name in ("weight_codes", "weight_scale", "weight_scale_codes")}
    return [
        (name, part, None if part is None or part.is_inference() else part._version) for name, part in parts.items()
    ]
