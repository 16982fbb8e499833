"""Per-layer shapes of any model: run it once on one image and watch its layers.

Only shapes matter, so a model on the meta device serves as well as a real one: the cost of an architecture can be
had from its config, without weights, in a fraction of a second.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.checks import check_fields, is_whole
from fliqs_hf.cost.products import WeightProducts
from fliqs_hf.errors import AllocationError, ConfigError, FliqsError
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.kinds import find_kind, kind_of, kinds, known_classes
from fliqs_hf.nn.select import quantizable_layers, why_not

logger = logging.getLogger(__name__)

#: Image side where a config names none (ResNet, RegNet, PoolFormer, ...): what those models are trained at.
DEFAULT_IMAGE_SIZE = 224


#: What cannot be quantized, as the kind of a layer.
FP32 = "fp32"

#: Of a model in which more than this part of the MACs stays in fp32 we warn: quantization cannot do much for it.
LARGE_FP32_SHARE = 0.5


@dataclass(frozen=True)
class LayerInfo:
    """What the cost of a layer depends on, apart from its formats.

    Attributes:
        name: as `model.named_modules()` gives it; the parameter's name where its module has several that compute.
        kind: the name of a registered kind of layer, such as "conv2d", or "fp32" for what cannot be quantized
            (modules of no known kind, fused projections of attention, tied or normalized weights, bare parameters): it
            costs its MACs at 32 × 32 bits in every allocation, and none may name it.
        macs: multiply-accumulates per image, summed over the calls of one forward pass; products with padding count,
            bias additions do not.
        weight_numel: elements of the weight.
        out_channels: outputs of a Linear, output channels of a convolution; one scale each.
        input_group: equal for layers of one kind that read the very same tensor, such as q, k and v. They can share
            one quantized input.
        input_numel, output_numel: elements per image of the largest input and output together of one call; 0 where
            they were not traced.

    Raises: ConfigError: an unknown kind, or a count that is below 1, or below 0 where 0 has a meaning.
    """

    name: str
    kind: str
    macs: int
    weight_numel: int
    out_channels: int
    input_group: int
    input_numel: int = 0
    output_numel: int = 0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if not self.name:
            raise ConfigError("a layer needs a name, as named_modules() gives it")
        if self.kind not in (known := [*(kind.name for kind in kinds()), FP32]):
            raise ConfigError(f"layer {self.name!r}: kind={self.kind!r} must be one of {', '.join(map(repr, known))}")
        least = {"macs": 1, "weight_numel": 1, "out_channels": 1, "input_numel": 0, "output_numel": 0}
        for attribute, low in least.items():
            if not is_whole(value := getattr(self, attribute), low):
                raise ConfigError(f"layer {self.name!r}: {attribute}={value!r} must be a whole number, at least {low}")

    @property
    def quantizable(self) -> bool:
        return self.kind != FP32


@dataclass
class _Seen:
    """Calls of one layer during the trace, or products of one weight outside of all layers."""

    shape: tuple[str, int, int]  # kind, elements of the weight, outputs
    macs: int = 0
    inputs: list[tuple[int, int]] = field(default_factory=list)  # (identity, version) of the input of each call
    numel: tuple[int, int] = (0, 0)  # of input and output, of the call with most of both


def trace_layers(
    model: nn.Module, inputs: Tensor | Mapping[str, Any] | None = None, *, names: Iterable[str] | None = None
) -> tuple[LayerInfo, ...]:
    """Shapes of the layers that one forward pass calls, in the order of their first call.

    Layers are those of `quantizable_layers`, and searchable and packed ones; every other product of a weight with what
    depends on the image (see `WeightProducts`) is a layer of kind "fp32". The model runs in evaluation mode without
    gradients, on its own device, which may be `meta`; it is left as it was found. Products that belong to no weight
    (attention scores and their product with the values) are not counted, as in FLIQS.

    Args:
        inputs: images [batch, channels, height, width], or keyword arguments of the model's `forward`, such as
            `{"pixel_values": …, "interpolate_pos_encoding": True}`. Default: `example_image(model)`.
        names: only these layers. By default every layer; those that are never called (the text tower of CLIP, when
            only the image tower runs) are left out and logged. Where most MACs stay in fp32, that is logged too.
    Raises: AllocationError: one of `names` is no such layer, or is never called.
        ConfigError: no layer is called at all, no example image can be derived, or the forward pass fails on the
        inputs or reads values on the meta device.
    """
    wanted = quantizable_layers(model)
    layers = {name: module for name, module in model.named_modules() if name in wanted or _is_fliqs_layer(module)}
    if names is not None:
        names = list(names)
        if unknown := [name for name in names if name not in layers]:
            raise AllocationError(f"cannot trace {why_not(model, unknown[0])}")
    arguments, batch = _arguments(model, inputs)
    seen = _watch(model, layers, arguments)

    missing = [name for name in (layers if names is None else names) if name not in seen]
    if missing and names is not None:
        raise AllocationError(
            f"{missing[0]!r} is never called by the forward pass ({len(missing)} such layers), so it has no cost: "
            f"leave it out of `names`, or give `inputs` that reach it"
        )
    if not seen:
        raise ConfigError(f"the forward pass of {type(model).__name__} calls no layer that is {known_classes('or')}")
    if missing:
        logger.warning("%d layers are never called and have no cost: %s", len(missing), ", ".join(missing))

    groups: dict[tuple[Any, ...], int] = {}
    result = []
    for name, record in seen.items():
        if names is not None and name not in names:
            continue
        kind, weight_numel, out_channels = record.shape
        # Tokens are part of the key: a Linear and a convolution quantize one tensor along different dimensions.
        key = (find_kind(kind).tokens, *record.inputs) if kind != FP32 else (name,)
        group = groups.setdefault(key, len(groups))
        macs = -(-record.macs // batch)  # rounded up where a layer's work does not depend on the batch
        numel = (-(-elements // batch) for elements in record.numel)
        result.append(LayerInfo(name, kind, macs, weight_numel, out_channels, group, *numel))
    if names is None:
        _warn_of_fp32(model, result)
    return tuple(result)


def _warn_of_fp32(model: nn.Module, layers: list[LayerInfo]) -> None:
    rest = sorted((layer for layer in layers if not layer.quantizable), key=lambda layer: -layer.macs)
    share = sum(layer.macs for layer in rest) / sum(layer.macs for layer in layers)
    if share > LARGE_FP32_SHARE:
        logger.warning(
            "%.1f %% of the multiply-accumulates of %s stay in fp32, whatever its formats: %d weights belong to no "
            "layer that can be quantized, such as %s",
            100 * share, type(model).__name__, len(rest), ", ".join(layer.name for layer in rest[:3]),
        )  # fmt: skip


def example_image(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> Tensor:
    """One black image for `model`, [1, channels, height, width], on the model's device and in its dtype.

    Size and channels come from `model.config` (or its `vision_config`): `image_size`, a number or (height, width),
    and `num_channels` (3 where absent). Where the config names no size, it is 224 × 224, and this is logged.

    Raises: ConfigError: the model has no config, or a size that is no positive number.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ConfigError(f"{type(model).__name__} has no config to derive an example image from; pass `inputs`")
    configs = [config, getattr(config, "vision_config", None)]
    size = image_size if image_size is not None else _first(configs, "image_size")
    if size is None:
        logger.warning(
            "the config of %s names no image size; costs are those of %d × %d pixels unless `inputs` are given",
            type(model).__name__,
            DEFAULT_IMAGE_SIZE,
            DEFAULT_IMAGE_SIZE,
        )
        size = DEFAULT_IMAGE_SIZE
    sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    channels = _first(configs, "num_channels") or 3
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in (*sides, channels)):
        raise ConfigError(
            f"cannot make an example image of size {size!r} with {channels!r} channels; pass `inputs` to trace_layers"
        )
    # Offloaded parameters rest on the meta device while their layers compute elsewhere, so a real one decides.
    floating = [p for p in model.parameters() if p.is_floating_point()]
    place = next((p for p in floating if p.device.type != "meta"), floating[0] if floating else torch.empty(0))
    return torch.zeros(1, channels, *sides, device=place.device, dtype=place.dtype)


def unlisted_bytes(model: nn.Module, layers: Iterable[LayerInfo]) -> int:
    """Bytes of everything in the model's state that is not the weight of one of `layers` that can be quantized.

    Biases, norms, embeddings, persistent buffers and the weights of other layers, in the dtypes they have now; a
    tensor with two names counts once. Together with `weight_bytes` this is the size of a checkpoint less its header.
    """
    names = [layer.name for layer in layers if layer.quantizable]
    of_layers = {
        f"{name}.{entry}"
        for name in names
        for entry in ("weight", "weight_codes", "weight_scale", "weight_scale_codes")
    }
    tensors = {
        id(tensor): tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in of_layers and isinstance(tensor, Tensor)
    }
    return sum(tensors.values())


def _watch(
    model: nn.Module, layers: Mapping[str, nn.Module], arguments: Mapping[str, Any] | Tensor
) -> dict[str, _Seen]:
    """Run the model once. Returns: layer name -> its calls, in the order of first calls."""
    seen: dict[str, _Seen] = {}
    alive: list[Tensor] = []  # inputs are kept, so that no identity is used twice

    def multiplied(name: str, weight: Tensor, macs: int) -> None:
        record = seen.setdefault(name, _Seen((FP32, weight.numel(), len(weight))))
        record.shape = (FP32, *record.shape[1:])  # a layer that is called, but whose weight is read as well
        record.macs += macs

    products = WeightProducts(model, multiplied)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            products.leave(output)
            x: Tensor = args[0] if args else next(iter(kwargs.values()))
            kind = kind_of(module)
            shape = kind.weight_shape(module)
            alive.append(x)
            record = seen.setdefault(name, _Seen((kind.name, shape.numel(), shape[0])))
            record.macs += kind.macs(module, x, output)
            record.numel = max(record.numel, (x.numel(), output.numel()), key=sum)
            record.inputs.append((id(x), 0 if x.is_inference() else x._version))

        return hook

    handles = []
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(lambda *_: products.enter()))
            handles.append(layer.register_forward_hook(hook_of(name), with_kwargs=True))
        # Tensors made in inference mode have no version, so that mode is left if the caller is in it.
        with evaluation(model), torch.inference_mode(False), torch.no_grad(), products.of(arguments):
            if isinstance(arguments, Tensor):
                model(arguments)
            else:
                model(**arguments)
    except (FliqsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code is not ours and may raise anything
        raise ConfigError(_reason(model, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _reason(model: nn.Module, error: Exception) -> str:
    name = type(model).__name__
    if "meta tensor" in str(error):
        return (
            f"the forward pass of {name} reads values, which the meta device does not have ({error}); trace the model "
            "on the CPU"
        )
    return (
        f"cannot trace {name}: its forward pass fails on the example ({type(error).__name__}: {error}); give "
        "`inputs`, the keyword arguments that it needs"
    )


def _arguments(model: nn.Module, inputs: Tensor | Mapping[str, Any] | None) -> tuple[Tensor | Mapping[str, Any], int]:
    """What to call the model with, and its batch size."""
    if inputs is None:
        return {"pixel_values": example_image(model)}, 1
    tensors = [inputs] if isinstance(inputs, Tensor) else [v for v in inputs.values() if isinstance(v, Tensor)]
    if not tensors or tensors[0].dim() == 0 or tensors[0].shape[0] == 0:
        raise ConfigError("`inputs` is a tensor, or keyword arguments of the model with a tensor, of batch 1 or more")
    return inputs, tensors[0].shape[0]


def _is_fliqs_layer(module: nn.Module) -> bool:
    return getattr(module, "is_fliqs_layer", False) is True


def _first(configs: Iterable[Any], attribute: str) -> Any:
    return next((value for config in configs if (value := getattr(config, attribute, None)) is not None), None)
