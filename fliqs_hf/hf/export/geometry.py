"""How the windows of a packed convolution move, as other programs write it: one number for each dimension."""

from __future__ import annotations

from dataclasses import dataclass

from fliqs_hf.nn.packed import PackedLayer


@dataclass(frozen=True)
class Geometry:
    """
    Attributes:
        begins, ends: zeros before and after the input; of a transposed convolution, what is cut from its output.
        output_padding: of a transposed convolution, zeros elsewhere.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begins: list[int]
    ends: list[int]
    output_padding: list[int]
    groups: int

    @classmethod
    def of(cls, layer: PackedLayer) -> Geometry:
        g = layer.geometry
        kernel = list(g["kernel_size"])
        if layer.kind.onnx == "ConvTranspose":
            begins = ends = list(g["padding"])
        else:  # from the last dimension on, and a number where `padding` may be a word
            padding = g["_reversed_padding_repeated_twice"]
            begins, ends = padding[-2::-2], padding[::-2]
        output_padding = list(g.get("output_padding", [0] * len(kernel)))
        return cls(
            kernel, list(g["stride"]), list(g["dilation"]), list(begins), list(ends), output_padding, g["groups"]
        )
