"""Gradients of what a kernel computed: those of the reference path at the same input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fliqs_hf.nn.native import Kernel
    from fliqs_hf.nn.packed import PackedLayer


class WithGradient(torch.autograd.Function):
    """A kernel under autograd; the backward pass runs the reference path once more, for models in evaluation mode that
    are called outside `torch.no_grad()` and mostly have no backward pass at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: PackedLayer, kernel: Kernel) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, bias)
        return kernel(layer, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        with torch.enable_grad():
            source = x.detach().requires_grad_()
            output = ctx.layer.reference(source)
            wanted = [source] if bias is None or not bias.requires_grad else [source, bias]
            gradients = torch.autograd.grad(output, wanted, gradient)
        return gradients[0], gradients[1] if len(wanted) > 1 else None, None, None
