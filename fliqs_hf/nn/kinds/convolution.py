"""What convolutions over any number of dimensions have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.nn.kinds.kind import LayerKind


class Convolution(LayerKind):
    """Input [images, channels, *positions], weight [out, channels / groups, *kernel]; any stride, groups, padding."""

    arguments: ClassVar[tuple[str, ...]] = (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
    )  # fmt: skip
    state: ClassVar[tuple[str, ...]] = ("_reversed_padding_repeated_twice",)

    def is_plain(self, cls: type[nn.Module]) -> bool:
        """A class that merely has a constructor of its own is one too, such as EfficientNet's depthwise one."""
        plain: Any = self.plain
        same = getattr(cls, "_conv_forward", None) is plain._conv_forward and cls.forward is plain.forward
        return cls is plain or same

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plain: Any = self.plain
        output: Tensor = plain._conv_forward(layer, x, weight, bias)
        return output

    def copies(self, layer: Any) -> int:
        return torch.Size(layer.kernel_size).numel()

    def input_rows(self, layer: Any, x: Tensor) -> Tensor:
        """The patches, [images × positions, channels × kernel]; channels of a group are neighbours."""
        patches = self._patches(layer, x)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
        return rows if layer.groups == 1 else rows.view(len(rows), layer.groups, -1).transpose(0, 1)

    def _patches(self, layer: Any, x: Tensor) -> Tensor:
        """[images, channels × kernel, positions]."""
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
        return self._unfold(x.float(), layer.kernel_size, layer.dilation, layer.stride)

    def _unfold(self, x: Tensor, kernel: Any, dilation: Any, stride: Any) -> Tensor:
        return functional.unfold(x, kernel, dilation=dilation, stride=stride)

    def not_a_product(self, layer: Any) -> str:
        padded = layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
        apart = layer.stride == layer.kernel_size and set(layer.dilation) == {1} and layer.groups == 1
        return "" if apart and not padded else "a convolution whose windows overlap or are padded"

    def product_rows(self, layer: Any, x: Tensor) -> Tensor:
        """Patches without a rest, position by position."""
        counts = [n // k for n, k in zip(x.shape[2:], layer.kernel_size, strict=True)]
        for dim, (n, k) in enumerate(zip(counts, layer.kernel_size, strict=True), 2):
            x = x.narrow(dim, 0, n * k)
        sizes = [size for pair in zip(counts, layer.kernel_size, strict=True) for size in pair]
        dims = range(len(counts))
        order = (0, *(2 + 2 * d for d in dims), 1, *(3 + 2 * d for d in dims))
        return x.reshape(*x.shape[:2], *sizes).permute(order).reshape(len(x) * torch.Size(counts).numel(), -1)

    def product_output(self, layer: Any, products: Tensor, shape: torch.Size) -> Tensor:
        counts = [n // k for n, k in zip(shape[2:], layer.kernel_size, strict=True)]
        return products.view(shape[0], *counts, -1).movedim(-1, 1)

    def takes(self, layer: Any, x: Tensor) -> bool:
        fits = x.dim() == len(layer.kernel_size) + 2 and x.numel() > 0 and x.shape[1] == layer.in_channels
        return fits and all(n >= k for n, k in zip(x.shape[2:], layer.kernel_size, strict=True))
