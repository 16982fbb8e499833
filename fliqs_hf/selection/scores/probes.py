"""The hooks of the sensitivity pass: Σ g_i·ΔY_i of every layer, format and image, during one backward pass.

With E = Wq − W and e = xq − x, g·(Wq xq − W x) = g·E x + (g W)·e + (g E)·e.
- The first part is the inner product of E with the gradient of the weight, for all formats one product of matrices.
- g W is the gradient of the layer's input, which the backward pass computes anyway; what a format takes is its
  rounding errors e and their sum over g W. Layers that read one tensor (q, k and v) share e.
- The third is quadratic in rounding errors and takes a matrix product per format: only up to `JOINT_BITS` bits.
Convolutions whose patches do not overlap are a Linear on patches. Other convolutions are run in every format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fliqs_hf.errors import DataError
from fliqs_hf.formats import Format
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.nn.searchable import QuantizerSettings
from fliqs_hf.quant import ROW, grid_params
from fliqs_hf.quant.grid import MIN_SCALE, round_to_grid
from fliqs_hf.quant.residual import code_errors
from fliqs_hf.quant.scale import activation_peak
from fliqs_hf.selection.scores.workers import Workers

#: What is squared: the sum of g·ΔY over an image, or each element of it.
Reduction = Literal["image", "element"]

#: Which of weight and input are quantized.
Role = tuple[bool, bool]

#: Up to so many bits a Linear's score has the product of the errors of weight and input. Beyond, it is left out: it is
#: quadratic in rounding errors and would take a matrix product per format. Scores of DeiT-Tiny without it, summed over
#: layers, are 1.56 of the exact ones at INT2, 1.02 at INT3 and E2M0, 0.985 and 1.012 at INT4 and E2M1; of one decision
#: at most 17 % off at 3 bits and 9 % at 4, a fraction of what another sample of as many images changes. Allocations
#: for 2.5 to 6 bits with it at INT2 alone have an expected loss at most 0.1 % above those with it at 2 to 4 bits (256
#: images of ImageNet).
JOINT_BITS = 2

#: Elements of an input, and of gradients of a weight, that are worked on at once. On a CPU an input is gone through
#: some hundred times, in its caches; elsewhere parts only bound the memory.
_INPUT_PART, _GRADIENT_PART, _DEVICE_PART = 2**17, 2**21, 2**26


@dataclass
class _Reading:
    """A tensor that layers read, until its part of the backward pass is done.

    Attributes:
        version: of `x` when it was read.
        rows: the layers, as indices; gradients: of their outputs; backs: of their inputs, from that layer alone.
    """

    x: Tensor
    version: int
    rows: list[int] = field(default_factory=list)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    backs: dict[int, Tensor] = field(default_factory=dict)


class Probes:
    """Hooks on `layers` that fill `changes` while batches go forward and backward.

    Between forward and backward only the layers' inputs are held, and the formats are gone through one at a time.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        formats: Sequence[Format],
        roles: Sequence[Role],
        settings: QuantizerSettings,
        reduction: Reduction,
    ) -> None:
        self.names, self.layers = list(layers), list(layers.values())
        self.formats, self.roles, self.settings, self.reduction = formats, roles, settings, reduction
        self.changes = torch.empty(0)
        self._images = 0
        self._readings: list[_Reading] = []
        self._calls: dict[int, _Reading] = {}
        self._scales: dict[int, dict[int, Tensor]] = {}  # of rows and formats
        self._own_scales = any(fmt.scales_itself for fmt in formats)  # for which a patch is no token
        self._workers = Workers()
        self._buffer = torch.empty(0)

    def __enter__(self) -> Probes:
        self._workers.start(self.layers[0].get_parameter("weight").device)
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.stop()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the forward pass: others, such as one that finds the labels, are not watched."""
        handles: list[RemovableHandle] = []
        try:
            for row, layer in enumerate(self.layers):
                if self.reduction == "image" and kind_of(layer).matrix:
                    handles.append(layer.register_forward_pre_hook(self._before(row)))
                    handles.append(layer.register_forward_hook(self._after(row)))
                else:
                    handles.append(layer.register_forward_hook(self._around(row)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, loss: Tensor, images: int) -> Tensor:
        """Go backward through a forward pass that was watched.

        Args:
            loss: the sum over the `images` of the batch.
        Returns: Σ g_i·ΔY_i, Σ (g_i·ΔY_i)² with the reduction "element": float32 [roles, L, K, images].
        """
        self._images = images
        shape = len(self.roles), len(self.layers), len(self.formats), images
        self.changes = torch.zeros(shape, device=loss.device)
        try:
            loss.backward()
            for reading in self._readings:  # where the output of one of the readers is not used
                if reading.backs:
                    self._measure(reading)
            return self.changes
        finally:
            self._readings, self._calls = [], {}

    def _before(self, row: int) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x: Tensor = inputs[0]
            if not torch.is_grad_enabled():
                return None
            reading = next((one for one in self._readings if one.x is x and one.version == x._version), None)
            if reading is None or row in reading.rows:
                reading = _Reading(x, x._version)
                self._readings.append(reading)
            reading.rows.append(row)
            self._calls[row] = reading
            # A tensor of its own, whose gradient is that of this layer. The first layers read what needs none.
            own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            own.register_hook(self._back(row, reading))
            return own, *inputs[1:]

        return hook

    def _after(self, row: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                reading = self._calls[row]

                def keep(gradient: Tensor) -> None:
                    reading.gradients[row] = gradient

                output.register_hook(keep)

        return hook

    def _back(self, row: int, reading: _Reading) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            reading.backs[row] = gradient
            if len(reading.backs) == len(reading.rows):
                self._readings = [one for one in self._readings if one is not reading]
                self._measure(reading)

        return hook

    def _around(self, row: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        """For a layer that is measured by its output alone."""

        def hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            x = inputs[0].detach()
            version = x._version

            def measure(gradient: Tensor) -> None:
                self._check(row, x, version)
                if self.reduction == "image" and _is_patches(layer) and not self._own_scales:
                    self._measure_patches(row, layer, x, gradient)
                else:
                    self._measure_outputs(row, layer, x, gradient)

            if not output.requires_grad:  # the first layers: nothing before them needs a gradient
                output = output.requires_grad_().clone()  # what follows may work in place, which a leaf forbids
            output.register_hook(measure)
            return output

        return hook

    def _check(self, row: int, x: Tensor, version: int) -> None:
        if x._version != version:
            raise DataError(f"the input of {self.names[row]!r} was changed in place after the layer read it: no score")

    @torch.no_grad()
    def _measure(self, reading: _Reading) -> None:
        rows = [row for row in reading.rows if row in reading.backs]
        self._check(rows[0], reading.x, reading.version)
        source, granularity = reading.x.detach(), self.settings.activation_granularity
        (peak,) = self._workers.each(lambda x: activation_peak(x, ROW, granularity), [source])
        values = [source, peak.expand(*source.shape[:-1], 1)]
        values += [table[row] for table in (reading.gradients, reading.backs) for row in rows]
        x, peak, *others = self._workers.each(lambda value: self._of_images(value.float()).contiguous(), values)
        self._add(rows, x, peak, others[: len(rows)], others[len(rows) :])

    def _of_images(self, value: Tensor) -> Tensor:
        """[images, tokens, features]: they are the slowest dimension of every input, also where windows or tokens join
        them."""
        return value.reshape(self._images, -1, value.shape[-1])

    @torch.no_grad()
    def _measure_patches(self, row: int, layer: Any, x: Tensor, gradient: Tensor) -> None:
        x, gradient = x.float(), gradient.float()
        kind, granularity = kind_of(layer), self.settings.activation_granularity
        peak = activation_peak(x, kind.tokens, granularity).expand(len(x), *[1] * (x.dim() - 1))
        x = kind.product_rows(layer, x).unflatten(0, (len(x), -1))
        gradient = gradient.flatten(2).transpose(1, 2)
        back = gradient @ self._weight(row).flatten(1)
        peak = peak.flatten(1)[:, None].expand(-1, x.shape[1], 1)
        x, peak, gradient, back = (self._of_images(value) for value in (x, peak, gradient, back))
        self._add([row], x, peak, [gradient], [back])

    def _add(
        self, rows: list[int], x: Tensor, peak: Tensor, gradients: Sequence[Tensor], backs: Sequence[Tensor]
    ) -> None:
        """Add the layers of one input to `changes`.

        Args:
            x: [batch, tokens, in]. peak: of each token, [batch, tokens, 1].
            gradients: of each layer's output, [batch, tokens, out]. backs: of each layer's input, the shape of `x`.
        """
        joint = [k for k, fmt in enumerate(self.formats) if fmt.bits <= JOINT_BITS and (True, True) in self.roles]
        kept: dict[int, list[Tensor]] = {k: [] for k in joint}
        for row, gradient in zip(rows, gradients, strict=True):
            errors = self._weight_errors(row)
            for k, error in zip(joint, self._workers.each(Tensor.clone, [errors[k] for k in joint]), strict=True):
                kept[k].append(error)
            by_weight = self._weight_products(errors.flatten(1), gradient, x)
            for role, (with_weight, _) in enumerate(self.roles):
                if with_weight:
                    self.changes[role, row] += by_weight
        by_input, by_both = self._input_products(x, peak, gradients, backs, kept)
        for role, (with_weight, with_input) in enumerate(self.roles):
            if with_input:
                self.changes[role, rows] += by_input + by_both if with_weight else by_input

    def _input_products(
        self,
        x: Tensor,
        peak: Tensor,
        gradients: Sequence[Tensor],
        backs: Sequence[Tensor],
        weight_errors: Mapping[int, Sequence[Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Σ (g W)·e, and Σ (g E)·e of the formats that `weight_errors` has E of: float32 [layers, K, batch] each."""
        peak = peak.clamp(min=MIN_SCALE)  # where all is 0
        by_input = x.new_zeros(len(backs), len(self.formats), len(x))
        by_both = torch.zeros_like(by_input)
        inputs = self.settings.inputs(ROW)

        def work(part: slice) -> None:
            values, peaks = x[part], peak[part]
            buffers = torch.empty_like(values), torch.empty_like(values, dtype=torch.int32)
            unscaled = torch.stack([back[part] for back in backs], 1)
            scaled, z = unscaled * peaks[:, None], values / peaks
            for k, fmt in enumerate(self.formats):
                by_peak = fmt.is_scaled and not fmt.scales_itself
                if fmt.scales_itself:
                    change = inputs(values, fmt).sub_(values)
                else:
                    change = code_errors(z if by_peak else values, fmt, *buffers)
                factor = 1 / fmt.max_value if by_peak else 1.0
                by_input[:, k, part] = _dots(change, scaled if by_peak else unscaled).T * factor
                if k in weight_errors:
                    change *= peaks if by_peak else 1.0
                    for layer, (gradient, error) in enumerate(zip(gradients, weight_errors[k], strict=True)):
                        through = gradient[part] @ error
                        by_both[layer, k, part] = _dots(change, through[:, None])[:, 0] * factor

        self._workers.each(work, _parts(x, _INPUT_PART, x[0].numel()))
        return by_input, by_both

    def _weight_errors(self, row: int) -> Tensor:
        """Wq − W of a layer in all formats, float32 [K, out, in], until the next call. Scales, which may be dear, are
        kept from batch to batch."""
        settings, weight = self.settings, self._weight(row)
        scales = self._scales.setdefault(row, {})
        count = len(self.formats) * weight.numel()
        if self._buffer.numel() < count:  # fresh memory would take as long as the arithmetic
            self._buffer = weight.new_empty(count)
        errors = self._buffer[:count].view(len(self.formats), *weight.shape)

        def work(k: int) -> None:
            if self.formats[k].scales_itself:
                torch.sub(settings.weights(weight, self.formats[k]), weight, out=errors[k])
                return
            data = grid_params(self.formats[k])
            if k not in scales:
                scales[k], _ = settings.weights.scale(weight, self.formats[k])
            saturate = settings.weight_scale != "absmax"
            rounded = round_to_grid(weight, scales[k], data, saturate, self.formats[k].is_integer)
            torch.sub(rounded, weight, out=errors[k])

        self._workers.each(work, range(len(self.formats)))
        return errors.flatten(2)

    def _weight_products(self, errors: Tensor, gradient: Tensor, x: Tensor) -> Tensor:
        """Inner products of `errors` [K, out·in] with the gradient of the weight of each image: [K, batch]."""
        found = errors.new_empty(len(errors), len(x))

        def work(part: slice) -> None:
            found[:, part] = errors @ torch.bmm(gradient[part].transpose(1, 2), x[part]).flatten(1).T

        self._workers.each(work, _parts(x, _GRADIENT_PART, errors.shape[1]))
        return found

    def _weight(self, row: int) -> Tensor:
        layer = self.layers[row]
        return kind_of(layer).rows(layer, layer.get_parameter("weight").detach()).float()

    @torch.no_grad()
    def _measure_outputs(self, row: int, layer: Any, x: Tensor, gradient: Tensor) -> None:
        """By running the layer in every format."""
        changes, settings = self.changes[:, row], self.settings
        kind = kind_of(layer)
        rows = kind.rows(layer, layer.weight)
        output = kind.multiply(layer, x, rows, None)  # without bias, which cancels
        for k, fmt in enumerate(self.formats):
            for role, (with_weight, with_input) in enumerate(self.roles):
                value, weight = x, rows
                if with_input:
                    value = settings.inputs(kind.tokens)(x, fmt)
                if with_weight:
                    weight = settings.weights(weight, fmt)
                change = kind.multiply(layer, value, weight, None).sub_(output).mul_(gradient)
                change = change.square_() if self.reduction == "element" else change
                changes[role, k] += change.reshape(changes.shape[-1], -1).sum(-1)


def _is_patches(layer: Any) -> bool:
    """Whether a convolution's patches do not overlap and nothing is added around the image."""
    kind = kind_of(layer)
    return not kind.matrix and not kind.not_a_product(layer)


def _parts(x: Tensor, elements: int, per_image: int) -> Iterator[slice]:
    """Slices of the images of `x` with about so many elements each, `per_image` of an image; more off the CPU."""
    step = max(1, (elements if x.device.type == "cpu" else _DEVICE_PART) // per_image)
    yield from (slice(start, start + step) for start in range(0, len(x), step))


def _dots(change: Tensor, weights: Tensor) -> Tensor:
    """Σ over tokens and features: [batch, tokens, in] and [batch, layers, tokens, in] -> [batch, layers]."""
    if change.device.type != "cpu":  # where so slim a product of matrices would leave most of the device idle
        return (change[:, None] * weights).flatten(2).sum(-1)
    return torch.bmm(change.flatten(1)[:, None], weights.flatten(2).transpose(1, 2))[:, 0]
