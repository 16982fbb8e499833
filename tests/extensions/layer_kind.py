"""BiT's convolution, which standardizes its weight at each pass: quantized, and packed, is what comes of that."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from fliqs_hf.nn.kinds import Convolution, register_kind
from fliqs_hf.quant import IMAGE


class StandardizedConv2d(Convolution):
    name, plain, tokens = "standardized_conv2d", WeightStandardizedConv2d, IMAGE
    state = ("eps", "pad")

    def is_plain(self, cls: type[nn.Module]) -> bool:
        return cls is WeightStandardizedConv2d

    def rows(self, layer: Any, weight: Tensor) -> Tensor:
        flat = functional.batch_norm(
            weight.reshape(1, len(weight), -1), None, None, training=True, momentum=0.0, eps=layer.eps
        )
        return flat.reshape_as(weight)

    def multiply(self, layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x if layer.pad is None else layer.pad(x)
        return functional.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def make_plain(self, layer: Any, bias: bool) -> nn.Module:
        raise NotImplementedError("no standardized weight gives back what it was made from")

    def not_a_product(self, layer: Any) -> str:
        return "a standardized convolution"


register_kind(StandardizedConv2d())
