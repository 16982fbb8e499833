"""Batch norms that follow a convolution: which those are, and folding them into packed convolutions.

In inference a batch norm is y·g + h per channel, with g = γ / √(σ² + ε) and h = β − μ·g. A packed convolution has a
scale per output channel anyway, so g goes into it and h becomes the bias: not one code of the weight is rounded anew,
and a model that was trained for its formats keeps them. Saved are a pass over every output and three of the norm's
four vectors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fliqs_hf.errors import ConfigError, FliqsError
from fliqs_hf.formats.packing import pack
from fliqs_hf.formats.rounding import encode
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.kinds import kind_of, plain_kind
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.nn.replace import replace
from fliqs_hf.nn.select import left_out


class Folded(nn.Identity):
    """Where a batch norm was, which the convolution before it has taken in. It keeps what `unfold` needs.

    Its name has no "BatchNorm" in it: Transformers would initialise weights that it expects of such a class.

    Attributes:
        eps, momentum: of the batch norm.
        biased: the convolution had a bias of its own.
    """

    def __init__(self, norm: nn.BatchNorm2d, biased: bool) -> None:
        super().__init__()
        self.train(norm.training)
        self.num_features, self.eps, self.momentum, self.biased = norm.num_features, norm.eps, norm.momentum, biased


@dataclass
class Pairs:
    """What one forward pass shows.

    Attributes:
        norms: convolution -> the batch norm that alone reads what it gives.
        others: every other batch norm -> why it is not one of these.
    """

    norms: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


class _Readers(TorchDispatchMode):
    """Counts operations on watched tensors, apart from those of batch norms themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0
        self.watched: dict[int, str] = {}  # tensor's identity -> the convolution that gave it
        self.alive: list[Tensor] = []  # so that no identity is used twice
        self.read: set[str] = set()

    def watch(self, name: str, output: Tensor) -> None:
        self.watched[id(output)] = name
        self.alive.append(output)

    def of(self, values: Any) -> Iterator[str]:
        return (self.watched[id(leaf)] for leaf in tree_leaves(values) if id(leaf) in self.watched)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.inside:
            self.read.update(self.of((args, kwargs)))
        return func(*args, **(kwargs or {}))


def convolutions_before(model: nn.Module, inputs: Mapping[str, Any]) -> Pairs:
    """Which batch norm reads which convolution's output, found by running `model` once in evaluation mode.

    Names and the order of modules say nothing: an output that anything else reads, or that the model returns, and a
    module that is called more than once, make no pair.

    Args:
        inputs: keyword arguments of the model's `forward`, which reach all its layers.
    Raises: ConfigError: the forward pass fails on them.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    # Those of no kind too, so that what follows them can be told why it stays.
    convolutions = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) or _convolves(module)
    }
    readers, calls, before = _Readers(), Counter[str](), dict[str, str | None]()
    handles: list[Any] = []

    def after_convolution(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            calls[name] += 1
            readers.watch(name, output)

        return hook

    def before_norm(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] += 1
            before[name] = next(readers.of((args, kwargs)), None)
            readers.inside += 1

        return hook

    def after_norm(*_: Any) -> None:
        readers.inside -= 1

    try:
        for name, module in convolutions.items():
            handles.append(module.register_forward_hook(after_convolution(name)))
        for name, norm in norms.items():
            handles.append(norm.register_forward_pre_hook(before_norm(name), with_kwargs=True))
            handles.append(norm.register_forward_hook(after_norm))
        with evaluation(model), torch.inference_mode(False), torch.no_grad(), readers:
            output = model(**inputs)
    except (FliqsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code is not ours and may raise anything
        raise ConfigError(
            f"which batch norm follows which convolution of {type(model).__name__} is not known, as its forward pass "
            f"fails on the example ({type(error).__name__}: {error}); give `inputs`, the arguments that it needs"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    readers.read.update(readers.of(dict(output) if isinstance(output, Mapping) else output))
    return _pairs(norms, calls, before, readers.read)


def _pairs(
    norms: Mapping[str, nn.BatchNorm2d], calls: Counter[str], before: Mapping[str, str | None], read: set[str]
) -> Pairs:
    """
    Args:
        calls: of norms and convolutions. before: norm -> the convolution whose output it was given.
        read: convolutions whose output something else reads, too.
    """
    pairs = Pairs()
    shared = Counter(before.values())
    for name, norm in norms.items():
        conv = before.get(name)
        if not calls[name]:
            reason = "the model does not call it"
        elif calls[name] > 1:
            reason = "the model calls it more than once"
        elif conv is None:
            reason = "it does not directly follow a convolution"
        elif calls[conv] > 1:
            reason = f"the model calls {conv!r}, which it follows, more than once"
        elif conv in read or shared[conv] > 1:
            reason = f"it is not alone in reading what {conv!r} gives"
        elif type(norm) is not nn.BatchNorm2d:
            reason = f"it is a {type(norm).__name__}, which may do anything"
        elif norm.running_mean is None or norm.weight is None:
            reason = "it has no running statistics, or no weight and bias"
        else:
            pairs.norms[conv] = name
            continue
        pairs.others[name] = reason
    return pairs


def _convolves(module: nn.Module) -> bool:
    """Whether a layer of a known kind has images as inputs, so that a BatchNorm2d can follow it."""
    kind = kind_of(module) if isinstance(module, PackedLayer) else plain_kind(module)
    return kind is not None and len(kind.tokens.dims) == 3


def factor_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """g and h of y·g + h, float64 [channels]."""
    assert norm.running_mean is not None and norm.running_var is not None
    factor = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
    return factor, norm.bias.detach().double() - norm.running_mean.double() * factor


@dataclass
class _Change:
    """Of one packed convolution: the tensors that it gets."""

    conv: PackedLayer
    codes: Tensor
    scale: Tensor | None
    bias: nn.Parameter

    def make(self) -> None:
        conv = self.conv
        conv.weight_codes, conv.weight_scale = self.codes, self.scale
        conv.bias = self.bias


@torch.no_grad()
def fold_packed(model: nn.Module, pairs: Pairs) -> tuple[dict[str, str], dict[str, str]]:
    """Fold batch norms into the packed convolutions before them, in place.

    Returns: convolution -> batch norm that it took in; batch norm that stays -> why.
    """
    folded, kept, changes = dict[str, str](), dict(pairs.others), list[_Change]()
    replacements: dict[str, nn.Module] = {}
    for name, norm_name in pairs.norms.items():
        conv, norm = model.get_submodule(name), model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        if not isinstance(conv, PackedLayer):
            kept[norm_name] = f"{name!r}, which it follows, is not quantized"
            continue
        change = _change(conv, norm)
        if isinstance(change, str):
            kept[norm_name] = f"{name!r}, which it follows, {change}"
            continue
        changes.append(change)
        folded[name] = norm_name
        replacements[norm_name] = Folded(norm, biased=conv.bias is not None)
    replace(model, replacements)
    for change in changes:
        change.make()
    return folded, kept


def _change(conv: PackedLayer, norm: nn.BatchNorm2d) -> _Change | str:
    """What the convolution gets, or why it cannot take in the norm: a scale of another shape, or out of range."""
    factor, shift = factor_and_shift(norm)
    values = (shift if conv.bias is None else shift + conv.bias.double() * factor).to(conv.dtype)
    bias = nn.Parameter(values, requires_grad=norm.bias.requires_grad)
    if not bool(bias.isfinite().all()):
        return f"would get a bias beyond {conv.dtype}"
    if bool((factor.float() == 1).all()):  # a norm that only adds, which any format can do without
        return _Change(conv, conv.weight_codes, conv.weight_scale, bias)
    scale = conv.weight_scale
    if scale is None or scale.shape != factor.shape:
        return f"has no scale per output channel in {conv.formats.weight}"
    scaled = (scale.double() * factor.abs()).float()
    silent = factor == 0
    tiny = torch.finfo(torch.float32).tiny  # a subnormal number would lose digits
    if not bool((silent | (scaled >= tiny) & scaled.isfinite()).all()):
        return "would get scales beyond float32"
    signs = factor.sign().float()[:, None]  # scales are positive: a negative factor turns the codes
    turned = conv.code_values().view(len(factor), -1) * signs + 0.0  # zeros come out as +0
    codes = pack(encode(turned, conv.formats.weight).flatten(), conv.formats.weight.bits)
    return _Change(conv, codes, torch.where(silent, scale, scaled), bias)


@torch.no_grad()
def fold_plain(model: nn.Module, pairs: Pairs) -> tuple[dict[str, str], dict[str, str]]:
    """Multiply g into the weights of plain convolutions, in place; their batch norms then only add.

    The model stays one of its architecture: what it saves, plain Transformers load.

    Returns: convolution -> batch norm that does no more than add now; other batch norms -> why.
    """
    reasons = left_out(model)  # a weight that others use too, above all
    folded, kept = dict[str, str](), dict(pairs.others)
    for name, norm_name in pairs.norms.items():
        conv, norm = model.get_submodule(name), model.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        if name in reasons:
            kept[norm_name] = f"of {name!r}, which it follows: {reasons[name]}"
            continue
        factor, shift = factor_and_shift(norm)
        kind, weight, bias = kind_of(conv), conv.get_parameter("weight"), conv.bias
        weight.copy_(kind.parameter(conv, kind.rows(conv, weight).double() * factor.view(-1, 1, 1, 1)))
        if isinstance(bias, Tensor):
            shift += bias.double() * factor
            bias.zero_()
        _only_adds(norm, shift)
        folded[name] = norm_name
    return folded, kept


def _only_adds(norm: nn.BatchNorm2d, shift: Tensor) -> None:
    """γ = 1, μ = 0, σ² = 1 − ε, whose sum with ε is 1 in float32, and β = `shift`."""
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    norm.weight.fill_(1)
    norm.bias.copy_(shift)


def expect_folded(model: nn.Module, packed: Mapping[str, nn.Module], folded: Mapping[str, str]) -> None:
    """Prepare a model that is still empty for a checkpoint in which batch norms were folded, in place.

    Args:
        packed: packed layers by name, not necessarily in the model yet.
        folded: convolution -> batch norm.
    Raises: ConfigError: a name that is no packed convolution, or no batch norm of as many channels.
    """
    modules = dict(model.named_modules())
    replacements: dict[str, nn.Module] = {}
    for name, norm_name in folded.items():
        conv, norm = packed.get(name), modules.get(norm_name)
        if not (isinstance(conv, PackedLayer) and _convolves(conv)):
            raise ConfigError(f"folded: {name!r} is no packed convolution of {type(model).__name__}")
        if type(norm) is not nn.BatchNorm2d or norm.num_features != conv.weight_shape[0]:
            raise ConfigError(
                f"folded: {norm_name!r} is no BatchNorm2d of {conv.weight_shape[0]} channels in "
                f"{type(model).__name__}, as {name!r} needs"
            )
        replacements[norm_name] = Folded(norm, biased=conv.bias is not None)
        if conv.bias is None:
            empty = torch.empty(conv.weight_shape[0], dtype=conv.dtype, device=conv.weight_codes.device)
            conv.bias = nn.Parameter(empty)
    replace(model, replacements)


@torch.no_grad()
def unfold(model: nn.Module, folded: Mapping[str, str]) -> None:
    """Give plain convolutions batch norms that only add, in place, so that the model is of its architecture again."""
    replacements: dict[str, nn.Module] = {}
    for name, norm_name in folded.items():
        conv, old = model.get_submodule(name), model.get_submodule(norm_name)
        assert isinstance(old, Folded) and isinstance(conv.bias, Tensor)
        norm = nn.BatchNorm2d(old.num_features, old.eps, old.momentum, device=conv.bias.device, dtype=conv.bias.dtype)
        _only_adds(norm, torch.zeros_like(conv.bias) if old.biased else conv.bias)
        if not old.biased:
            conv.register_parameter("bias", None)
        replacements[norm_name] = norm.train(old.training)
    replace(model, replacements)
