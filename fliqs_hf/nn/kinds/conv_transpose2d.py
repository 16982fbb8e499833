"""`nn.ConvTranspose2d`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fliqs_hf.nn.kinds.convolution import Convolution
from fliqs_hf.nn.kinds.kind import register_kind
from fliqs_hf.quant.tokens import IMAGE


class ConvTranspose2d(Convolution):
    """Input [images, channels, height, width]; the parameter is [channels, out / groups, *kernel], its rows are
    [out, channels / groups, *kernel]."""

    name = "conv_transpose2d"
    plain = nn.ConvTranspose2d
    tokens = IMAGE
    onnx = "ConvTranspose"
    arguments = (*Convolution.arguments, "output_padding")
    state = ()

    def is_plain(self, cls: type[nn.Module]) -> bool:
        return cls is self.plain

    def rows(self, layer: Any, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)

    def parameter(self, layer: Any, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv_transpose2d(
            x, self.parameter(layer, weight), bias, layer.stride, layer.padding, layer.output_padding, layer.groups,
            layer.dilation,
        )  # fmt: skip

    def macs(self, layer: Any, x: Tensor, output: Tensor) -> int:
        shape = self.weight_shape(layer)
        return x.numel() * (shape[0] // layer.groups) * shape[2:].numel()

    def copies(self, layer: Any) -> int:
        # Zeros between the values multiply the rows too.
        return super().copies(layer) * layer.stride[0] * layer.stride[1]

    def _patches(self, layer: Any, x: Tensor) -> Tensor:
        """Those of the convolution by the turned kernel that a transposed one is: of the input with zeros between its
        values and around them."""
        (down, right), (height, width) = layer.stride, x.shape[2:]
        spread = x.new_zeros(*x.shape[:2], (height - 1) * down + 1, (width - 1) * right + 1)
        spread[:, :, ::down, ::right] = x
        around: list[int] = []
        for dim in (1, 0):
            before = layer.dilation[dim] * (layer.kernel_size[dim] - 1) - layer.padding[dim]
            around += [before, before + layer.output_padding[dim]]
        patches = self._unfold(functional.pad(spread, around).float(), layer.kernel_size, layer.dilation, (1, 1))
        kernel = patches.view(*x.shape[:2], *layer.kernel_size, -1).flip(2, 3)
        return kernel.flatten(1, 3)

    def not_a_product(self, layer: Any) -> str:
        return "a transposed convolution"


CONV_TRANSPOSE2D = register_kind(ConvTranspose2d())
SearchableConvTranspose2d, PackedConvTranspose2d = CONV_TRANSPOSE2D.searchable, CONV_TRANSPOSE2D.packed
