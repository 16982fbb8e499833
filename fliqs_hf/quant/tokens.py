"""What one token of a layer's input is: the values that share a scale, and the direction of blocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tokens:
    """Dimensions of an input, counted from the last one.

    Attributes:
        dims: over which a token reaches: all its values share one scale, if it has one scale.
        features: along which the blocks of a format run, one of `dims`.
    """

    dims: tuple[int, ...]
    features: int


#: A vector that a matrix multiplies, [..., features].
ROW = Tokens((-1,), -1)
#: An image of a convolution, [..., channels, height, width]: blocks run along the channels of each pixel.
IMAGE = Tokens((-3, -2, -1), -3)
