"""`rotate`: another basis for what a transformer's layers hand on, so that no channel stands out; the model answers as
before.

Between its blocks a pre-norm transformer only adds to one vector per token, and each block reads that vector through a
LayerNorm. An orthogonal matrix Q that keeps the vector of ones commutes with the normalisation (mean and length stay),
so all that is added can be turned by Q and all that reads turned back, in the weights, once the norms' own factors
and shifts have moved into the layers that read them. In the same way each head's values can be turned by an
orthogonal R that the output projection turns back: attention mixes tokens, not channels. What a few channels held then
lies in all of them, and a scale per token fits.

Nothing is added to the model and it stays an ordinary checkpoint. What is found in it is a guess by what layers read
and write, so the result is compared with the model before, on images, and undone where they differ.

Source: Ashkboos et al. 2024 (QuaRot, arXiv 2404.00456) and Liu et al. 2024 (SpinQuant, arXiv 2405.16406), for language
    models with RMSNorm; the condition on Q is what LayerNorm's mean asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.quantizer import refuse_packed
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.select import is_searchable

logger = logging.getLogger(__name__)

#: Largest change of an answer, as a part of the largest, that rounding weights to float32 may make: a deep network
#: hands on 2**-24 of each of some hundred layers. A wrong turn changes answers by their own size.
TOLERANCE = 1e-3

#: What value projections of attention are called in Transformers.
VALUE_NAMES = ("v_proj", "value", "v")


@dataclass
class _Stream:
    """What writes to the vector of each token, and what reads it.

    Attributes:
        norms: LayerNorm -> layers that read what it gives.
        writers: layers whose output is added.
        tokens: parameters [..., width] that are added or joined: class tokens, positions.
        scales: factors per channel on the output of a writer (LayerScale).
        values: value projection -> output projection of the same attention.
    """

    width: int
    norms: list[tuple[nn.LayerNorm, list[nn.Linear]]] = field(default_factory=list)
    writers: list[nn.Linear | nn.Conv2d] = field(default_factory=list)
    tokens: list[nn.Parameter] = field(default_factory=list)
    scales: list[tuple[nn.Parameter, nn.Linear]] = field(default_factory=list)
    values: list[tuple[nn.Linear, nn.Linear]] = field(default_factory=list)


@torch.no_grad()
def rotate(model: Any, images: Tensor, seed: int = 0) -> dict[str, str]:
    """Rotate the residual stream and the attention values of a plain model, in place, each where that changes no
    answer beyond rounding; what stays, and why, is logged.

    Args:
        model: a transformer of Transformers; its parameters must be float32, or it stays as it is.
        images: a few, as the model takes them, [batch, channels, height, width], to find its structure with and to
            compare on.
        seed: of the random orthogonal matrices.
    Returns: "residual stream" and "attention values" -> "" where it was rotated, else why it was not.
    Raises: ConfigError: a packed or searchable model.
    """
    if any(is_searchable(module) for module in model.modules()):
        raise ConfigError("a searchable model still learns: rotate the plain one, before make_searchable")
    refuse_packed(model)
    with evaluation(model):
        before = _answer(model, images)
        return {
            name: _try(change, model, images, before, seed, name)
            for name, change in (("residual stream", _rotate_stream), ("attention values", _rotate_values))
        }


def _try(change: Any, model: Any, images: Tensor, before: Tensor, seed: int, name: str) -> str:
    """Make a change and compare. Returns: why it was undone, or ""."""
    try:
        with _undone_on_failure(model):
            change(model, images[:1], seed)
            error = float((_answer(model, images) - before).abs().max() / before.abs().max().clamp(min=1e-30))
            if not error <= TOLERANCE:
                raise ConfigError(f"its answers would change by {error:.1e} of the largest")
    except ConfigError as reason:
        logger.info("%s: the %s stays as it is: %s", type(model).__name__, name, reason)
        return str(reason)
    return ""


@contextmanager
def _undone_on_failure(model: nn.Module) -> Iterator[None]:
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        yield
    except BaseException:  # an interruption too must not leave half a change
        model.load_state_dict(saved)
        raise


def _answer(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, or the first that the model gives."""
    answer: Tensor = model(images)[0]
    return answer


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 [size, size]."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


def keeping_ones(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix that maps the vector of ones to itself, float64 [size, size]."""
    mirror = torch.full((size,), size**-0.5, dtype=torch.float64)
    mirror[0] -= 1
    mirror = torch.eye(size, dtype=torch.float64) - 2 * torch.outer(mirror, mirror) / mirror.square().sum()
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(size - 1, seed))
    return mirror @ inner @ mirror


def _rotate_stream(model: Any, images: Tensor, seed: int) -> None:
    stream = _find(model, images)
    device = images.device
    turn = keeping_ones(stream.width, seed).to(device)
    for scale, writer in stream.scales:
        writer.weight.copy_(writer.weight.double() * scale.double()[:, None])
        if writer.bias is not None:
            writer.bias.copy_(writer.bias.double() * scale.double())
        scale.fill_(1)
    for layer in stream.writers:
        layer.weight.copy_((turn @ layer.weight.double().flatten(1)).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(turn @ layer.bias.double())
    for token in stream.tokens:
        token.copy_(token.double() @ turn.T)
    for norm, readers in stream.norms:
        for reader in readers:
            weight = reader.weight.double().view(reader.out_features, -1, stream.width)
            if norm.bias is not None:
                shift, bias = (weight @ norm.bias.double()).sum(1), reader._parameters["bias"]
                if bias is not None:
                    bias.copy_(bias.double() + shift)
                elif bool(shift.any()):
                    raise ConfigError("a layer that reads a norm has no bias to take the norm's")
            if norm.elementwise_affine:
                weight = weight * norm.weight.double()
            reader.weight.copy_((weight @ turn.T).flatten(1))
        if norm.elementwise_affine:
            norm.weight.fill_(1)
        if norm.bias is not None:
            norm.bias.zero_()


def _rotate_values(model: Any, images: Tensor, seed: int) -> None:
    stream = _find(model, images)
    heads = getattr(model.config, "num_attention_heads", None)
    if not stream.values or not isinstance(heads, int):
        raise ConfigError("no value projections were found")
    for number, (value, output) in enumerate(stream.values):
        if value.out_features % heads or output.in_features != value.out_features:
            raise ConfigError("value and output projections do not fit together")
        turn = orthogonal(value.out_features // heads, seed + 1 + number).to(images.device)
        value.weight.copy_((turn @ value.weight.double().view(heads, len(turn), -1)).flatten(0, 1))
        if value.bias is not None:
            value.bias.copy_((value.bias.double().view(heads, -1) @ turn.T).flatten())
        weight = output.weight.double().view(output.out_features, heads, -1)
        output.weight.copy_((weight @ turn.T).flatten(1))


def _find(model: nn.Module, images: Tensor) -> _Stream:
    """Run `model` and see who reads and who writes.

    Raises: ConfigError: what was found is no pre-norm transformer of float32 parameters.
    """
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ConfigError("its parameters are not float32, and others would lose accuracy")
    calls = _calls(model, images)
    norms = [call.module for call in calls if isinstance(call.module, nn.LayerNorm)]
    if not norms:
        raise ConfigError("it has no LayerNorm")
    if len({norm.normalized_shape for norm in norms}) > 1 or len(norms[0].normalized_shape) > 1:
        raise ConfigError("its norms are of several widths, so there is no one vector that all blocks add to")
    if len({id(call.module) for call in calls}) < len(calls):
        raise ConfigError("it runs a layer more than once")
    stream = _Stream(norms[0].normalized_shape[0])
    _sort_layers(calls, stream, len(norms))
    _sort_parameters(model, calls, stream)
    return stream


@dataclass(frozen=True)
class _Call:
    """A module without children that ran, and the memory of what it read and wrote."""

    name: str
    module: nn.Module
    read: int
    wrote: int


def _calls(model: nn.Module, images: Tensor) -> list[_Call]:
    """In the order in which they ran; those without parameters are left out."""
    calls: list[_Call] = []
    kept: list[Tensor] = []  # while all are alive, no memory is used twice

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                kept.extend((args[0], output))
                calls.append(_Call(name, module, _memory(args[0]), _memory(output)))

        return hook

    handles = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _memory(tensor: Tensor) -> int:
    """The same for a tensor and all views of it."""
    return tensor.untyped_storage().data_ptr()


def _sort_layers(calls: list[_Call], stream: _Stream, norms: int) -> None:
    """A layer that reads what a norm gives, or its part of the result behind the last norm, is a reader; of the others
    those write that give a vector of the stream's width."""
    readers: dict[int, list[nn.Linear]] = {}
    value: nn.Linear | None = None
    for call in calls:
        layer = call.module
        if isinstance(layer, nn.LayerNorm):
            readers[call.wrote] = []
            stream.norms.append((layer, readers[call.wrote]))
        elif isinstance(layer, nn.Conv2d):
            if stream.norms or layer.out_channels != stream.width:
                raise ConfigError("it has convolutions other than the one that makes tokens")
            stream.writers.append(layer)
        elif isinstance(layer, nn.Linear):
            behind = len(stream.norms) == norms and layer.in_features % stream.width == 0
            if call.read in readers:
                readers[call.read].append(layer)
                value = layer if call.name.rpartition(".")[2] in VALUE_NAMES else value
            elif behind:
                stream.norms[-1][1].append(layer)
            elif layer.out_features == stream.width:
                stream.writers.append(layer)
                if value is not None:
                    stream.values.append((value, layer))
                value = None


def _sort_parameters(model: nn.Module, calls: list[_Call], stream: _Stream) -> None:
    """Parameters that are no layer's: rows of the stream, or factors on what a layer writes."""
    wrote = {call.wrote: call.module for call in calls if call.module in stream.writers}
    scaled = {id(call.module): wrote.get(call.read) for call in calls}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.shape[-1:] != (stream.width,):
                continue
            writer = scaled.get(id(module))
            if parameter.dim() > 1 or isinstance(module, nn.Embedding):
                stream.tokens.append(parameter)
            elif isinstance(writer, nn.Linear):
                stream.scales.append((parameter, writer))
            else:
                raise ConfigError(f"{f'{name}.{own}'.lstrip('.')!r} multiplies or adds channels in an unknown place")
