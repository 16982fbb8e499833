"""`calibrate`: pack a model in the formats of an allocation, with the help of calibration images.

All images go through the model at once, so that a layer is finished when the pass reaches it: its input is then what
the layers before it give *quantized*, on every image, and one forward pass does what takes others a pass per layer.
The price is the memory of one forward pass over all calibration images (DeiT-Tiny: 3.7 MB per image).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.formats import BlockFormat
from fliqs_hf.hf.config import FLIQSConfig
from fliqs_hf.hf.quantizer import declare_packed, quantize, refuse_packed, require_transformers
from fliqs_hf.nn import format_switch, quantizable_layers, restore
from fliqs_hf.nn.batchnorm import convolutions_before
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.finite import check_finite
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.replace import replace
from fliqs_hf.nn.select import is_searchable
from fliqs_hf.nn.swap import packed_like
from fliqs_hf.ptq.gptq import DAMPING, check_damping, gptq_round, gptq_round_scaled, input_hessian
from fliqs_hf.ptq.ranges import METHODS, PERCENTILE, check_percentile, clip_factor, static_scale
from fliqs_hf.quant.block import from_blocks

logger = logging.getLogger(__name__)

Rounding = Literal["nearest", "gptq"]
Activations = Literal["dynamic", "clipped", "absmax", "percentile", "mse"]

#: Of what `activations` says; the others fix scales.
_GRANULARITIES = {"dynamic": "per_token", "clipped": "per_token_clipped"}

#: Inputs that a scale by the layer's output takes for each weight of an output channel. A classifier reads one token
#: of each image: on fewer it would fit those images and no others.
ROWS_PER_WEIGHT = 8

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]


@dataclass(frozen=True)
class _Options:
    """The arguments of `calibrate`, checked."""

    rounding: str
    bias_correction: bool
    activations: str
    weight_scale: str
    percentile: float
    damping: float

    def __post_init__(self) -> None:
        for name, choices in (("rounding", ("nearest", "gptq")), ("activations", (*_GRANULARITIES, *METHODS))):
            if not isinstance(value := getattr(self, name), str) or value not in choices:
                raise ConfigError(f"{name}={value!r} does not exist; choose from {', '.join(map(repr, choices))}")
        if self.weight_scale == "output" and self.rounding != "gptq":
            raise ConfigError(f"weight_scale='output' is what GPTQ finds; with rounding={self.rounding!r} take 'mse'")
        check_percentile(self.percentile)
        check_damping(self.damping)
        if not isinstance(self.bias_correction, bool):
            raise ConfigError(f"bias_correction={self.bias_correction!r}: give True, False or None")

    @property
    def needs_images(self) -> bool:
        return self.rounding != "nearest" or self.bias_correction or self.activations != "dynamic"


@torch.no_grad()
def calibrate(
    model: Any,
    allocation: Allocation | Mapping[str, Any],
    batches: Iterable[Tensor],
    *,
    rounding: Rounding = "gptq",
    bias_correction: bool | None = None,
    activations: Activations = "dynamic",
    weight_scale: Literal["absmax", "mse", "output"] = "mse",
    percentile: float = PERCENTILE,
    damping: float = DAMPING,
) -> Any:
    """Pack a Transformers model in the formats of `allocation`, in place, as well as post-training methods can.

    The result saves with `save_pretrained` and loads with `from_pretrained`, bit for bit.

    Args:
        model: an image classifier, plain or searchable.
        allocation: layer name -> formats; layers that it does not name stay as they are.
        batches: images as the model takes them, [batch, channels, height, width], floating-point, without labels;
            iterated once (not at all where no option needs them). All of them are held in memory; 128 to 512 images
            are usual.
        rounding: "nearest", or "gptq" (a layer whose Hessian cannot be inverted even with damping is rounded to
            nearest, with a line in the log).
        bias_correction: shift existing biases, or the means of batch norms that alone read a convolution without a
            bias, so that the mean of every output channel is that of the fp32 model; takes a second pass. Default:
            where input scales are fixed, which is where it pays (docs/ptq.md).
        activations: "dynamic" scales each input by itself (per token, per image in convolutions); "clipped" does the
            same times one factor of at most 1 per layer, which gives the least squared error of the layer's output;
            the others fix one scale per layer: "absmax", "percentile" of |x|, or "mse" for the least squared error.
        weight_scale: "absmax", "mse" for the scale of an output channel with the least squared error, or "output" for
            the one with which GPTQ changes the layer's output least ("mse" in block formats, and in layers that read
            fewer than 8 inputs for each of their weights).
        percentile: with `activations="percentile"`, in (0, 100].
        damping: of GPTQ, as a part of the mean of the Hessian's diagonal.
    Returns: `model`, in evaluation mode.
    Raises: ConfigError: an unknown option, a packed model. FormatError: NaN or infinity in the model.
        AllocationError: a layer that does not exist. DataError: no images, or such that do not fit together or are
        not finite; a layer that the model calls twice, or one that needs a static scale and is not reached. The model
        is as it was then.
    Source: GPTQ, Frantar et al. 2022 (arXiv 2210.17323); bias correction, Nagel et al. 2019 (arXiv 1906.04721),
        section 4.2 and its empirical form in appendix D.
    """
    if bias_correction is None:
        bias_correction = activations not in tuple(_GRANULARITIES)
    options = _Options(rounding, bias_correction, activations, weight_scale, percentile, damping)
    config = _checked(model, allocation, options)
    if not options.needs_images:
        return quantize(model, config)
    config.allocation = config.resolve(model)
    layers = {name: layer for name, layer in quantizable_layers(model).items() if name in config.allocation}
    with _plain(model):
        packed, shifts = _packed(model, layers, config, options, batches)
    replace(model, packed)
    for norm, shift in shifts.items():
        model.get_submodule(norm).running_mean.sub_(shift)
    restore(model)
    return declare_packed(model, config)


def _checked(model: Any, allocation: Allocation | Mapping[str, Any], options: _Options) -> FLIQSConfig:
    """The configuration of the result, if the model can have one."""
    require_transformers(model)
    refuse_packed(model)
    check_finite(model)
    return FLIQSConfig(
        allocation=allocation,
        weight_scale="mse" if options.weight_scale == "output" else options.weight_scale,
        activation_granularity=_GRANULARITIES.get(options.activations, "static"),
    )


def _packed(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: FLIQSConfig,
    options: _Options,
    batches: Iterable[Tensor],
) -> tuple[dict[str, PackedLayer], dict[str, Tensor]]:
    """The packed layer for each of `layers`, not yet in the model, and by what means of batch norms are to fall."""
    images, means = _read(model, layers if options.bias_correction else {}, batches)
    norms = convolutions_before(model, {"pixel_values": images[:1]}).norms if options.bias_correction else {}
    packed: dict[str, PackedLayer] = {}
    shifts: dict[str, Tensor] = {}

    def hook(name: str) -> Hook:
        def finish(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if name in packed:
                raise DataError(
                    f"the model calls {name!r} more than once, so it has no one input to calibrate on: leave it out "
                    "of the allocation, or use fliqs_hf.quantize"
                )
            packed[name] = packed_like(layer, config.allocation[name], config.settings)
            output = _pack(packed[name], name, layer, inputs[0], options)
            bias = layer._parameters["bias"]
            if name in means and (bias is not None or name in norms):
                shift = means[name] - _channel_mean(layer, output)
                if bias is None:
                    shifts[norms[name]] = shift
                else:
                    packed[name].bias = _shifted(bias, shift)
                output += shift.to(output.dtype).view(-1, *[1] * (output.dim() - 1 - _channel(layer, output)))
            bar.update()
            return output

        return finish

    name = "GPTQ" if options.rounding == "gptq" else "rounding"
    with tqdm(total=len(layers), desc=name, unit="layer") as bar, _hooks(layers, hook):
        model(images)
    for name, layer in layers.items():
        if name not in packed:  # no image ever gets there: what it computes matters to none of them
            packed[name] = packed_like(layer, config.allocation[name], config.settings)
            packed[name].pack_(layer.weight)  # type: ignore[arg-type]
            if packed[name].input_scale is not None:
                raise DataError(
                    f"the model does not call {name!r} for images, so there is nothing to make its input scale from: "
                    "leave it out of the allocation, or choose activations='dynamic'"
                )
    return packed, shifts


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Run `model` in evaluation mode and floating point within this context, searchable or not."""
    searchable = any(map(is_searchable, model.modules()))
    with evaluation(model), format_switch(model).disabled() if searchable else nullcontext():
        yield


def _read(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """All images as one tensor on the model's device, and the mean of every output channel of `layers` in fp32.

    Returns: [images, channels, height, width]; layer -> float64 [out].
    """
    device = next(model.parameters()).device
    kept: list[Tensor] = []
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Hook:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            total = _channel_mean(layer, output) * len(kept[-1])
            sums[name] = sums[name] + total if name in sums else total

        return add

    if not isinstance(batches, Iterable):
        raise DataError(f"batches={batches!r}: give an iterable of images [batch, channels, height, width]")
    with _hooks(layers, hook):
        for number, batch in enumerate(batches):
            _check_batch(number, batch, kept)
            kept.append(batch.to(device))
            if layers:
                model(kept[-1])
    if not kept:
        raise DataError("batches are empty: give at least one batch of calibration images")
    images = torch.cat(kept)
    return images, {name: total / len(images) for name, total in sums.items()}


def _check_batch(number: int, batch: Any, others: list[Tensor]) -> None:
    """Raises: DataError: no images, or none that fit to the other batches."""
    found = f"{batch.dtype} {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
    if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point() or not batch.numel():
        raise DataError(
            f"batch {number} is {found}: give floating-point images [batch, channels, height, width] as the model "
            "takes them (pixel_values), without labels"
        )
    if others and batch.shape[1:] != others[0].shape[1:]:
        raise DataError(
            f"batch {number} is {found}, the first one {list(others[0].shape)}: images must be of one size"
        )
    if not bool(batch.isfinite().all()):
        raise DataError(f"batch {number} holds NaN or infinity: check the images and their processing")


def _pack(packed: PackedLayer, name: str, layer: nn.Module, x: Tensor, options: _Options) -> Tensor:
    """Fill `packed` from the fp32 `layer` and what it reads, `x`. Returns: the output of the packed layer."""
    # A sum is the fastest pass over the values: one that is not finite makes it NaN or infinite.
    if not bool(x.sum(dtype=torch.float64).isfinite()):
        raise DataError(
            f"the input of {name!r} holds NaN or infinity: check the images, the checkpoint and the formats"
        )
    formats, settings = packed.formats, packed.settings
    if packed.input_scale is not None:
        assert formats.activation is not None
        if options.activations == "clipped":
            packed.input_scale = clip_factor(x, layer, formats.activation)
        else:
            packed.input_scale = static_scale(x, formats.activation, options.activations, options.percentile)
    weight = packed.kind.rows(layer, layer.weight.detach()).float()  # type: ignore[operator]
    if options.rounding == "gptq":
        scale, whole = settings.weights.scale(weight, formats.weight)
        steps = scale.flatten(1)
        if isinstance(formats.weight, BlockFormat):
            row = weight[0].numel()
            steps = from_blocks(scale.expand(-1, -1, formats.weight.block or row), row)
        try:
            hessian = input_hessian(layer, packed.quantized_input(x))
            arguments = weight.flatten(1), steps, formats.weight, hessian, options.damping
            rows = x.numel() // x.shape[packed.kind.tokens.features]
            enough = rows >= ROWS_PER_WEIGHT * hessian.shape[-1]
            plain = formats.weight.is_scaled and not formats.weight.scales_itself
            if options.weight_scale == "output" and enough and plain:
                rounded, steps = gptq_round_scaled(*arguments)
                scale = steps.view_as(scale)
            else:
                rounded = gptq_round(*arguments)
            packed.pack_(rounded.view_as(weight), scale, whole)
        except DataError as error:
            logger.warning("%s is rounded to nearest instead of by GPTQ: %s", name, error)
            packed.pack_(weight)
    else:
        packed.pack_(weight)
    output: Tensor = packed(x)
    return output


def _shifted(bias: nn.Parameter, shift: Tensor) -> nn.Parameter:
    return nn.Parameter((bias.double() + shift).to(bias.dtype), bias.requires_grad)


def _channel(layer: nn.Module, output: Tensor) -> int:
    """The dimension of the output channels."""
    return output.dim() + kind_of(layer).tokens.features


def _channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    """Mean of every output channel over images and positions, float64 [out]."""
    channel = _channel(layer, output)
    return output.mean([dim for dim in range(output.dim()) if dim != channel], dtype=torch.float64)


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], hook: Callable[[str], Hook]) -> Iterator[None]:
    """`hook(name)` after every forward pass of each layer, within this context."""
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
