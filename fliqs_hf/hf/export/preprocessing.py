"""The image processor's normalization as part of an ONNX graph, which then takes the pixels of a resized image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fliqs_hf.errors import ConfigError


@dataclass(frozen=True)
class Normalization:
    """pixel value = pixel × factor + offset, per channel; pixels from 0 to 255, float32."""

    factor: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, channels: int) -> Normalization:
        """Raises: ConfigError: the processor does something else than rescaling and normalizing by channel."""
        rescale = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
        if getattr(processor, "offset", None):
            raise ConfigError(f"{type(processor).__name__} shifts its images: its normalization cannot be included")
        mean, deviation = [0.0] * channels, [1.0] * channels
        if getattr(processor, "do_normalize", False):
            mean, deviation = list(processor.image_mean), list(processor.image_std)
        if not len(mean) == len(deviation) == channels or not all(deviation):
            raise ConfigError(f"image_mean={mean} and image_std={deviation} do not fit {channels} channels")
        return cls(tuple(rescale / d for d in deviation), tuple(-m / d for m, d in zip(mean, deviation, strict=True)))

    def pixels(self, values: Tensor) -> Tensor:
        """The pixels, from 0 to 255, that `values` [images, channels, height, width] were made of."""
        factor, offset = (torch.tensor(v).view(-1, 1, 1) for v in (self.factor, self.offset))
        return (values - offset) / factor

    def put_before(self, model: Any) -> None:
        """Let the graph of `model` take pixels, under the name of its input."""
        import onnx_ir

        from fliqs_hf.hf.export.nodes import Writer

        writer = Writer(model)
        writer.before, writer.layer = model.graph[0], "normalization"
        old = model.graph.inputs[0]
        new = onnx_ir.val(old.name, type=old.type, shape=old.shape)
        factor, offset = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (self.factor, self.offset))
        users = list(old.uses())
        values = writer.op("Add", writer.op("Mul", new, writer.constant(factor)), writer.constant(offset))
        for node, index in users:
            node.replace_input_with(index, values)
        old.name = f"{old.name}_normalized"
        model.graph.inputs[0] = new
