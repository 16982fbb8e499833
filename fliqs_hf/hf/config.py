"""`FLIQSConfig`: what to quantize, in which formats, and how scales are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.errors import AllocationError, ConfigError, did_you_mean
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.hf.checkpoint import part_of
from fliqs_hf.hf.integrity import ALGORITHMS, Digests
from fliqs_hf.hf.stored import check_stored
from fliqs_hf.nn import QuantizerSettings, quantizable_layers
from fliqs_hf.nn.adapters import register_peft
from fliqs_hf.nn.kernels import check_kernels, check_weight_cache
from fliqs_hf.nn.native import Kernels, WeightCache
from fliqs_hf.nn.select import matches, why_not

METHOD = "fliqs"
FORMAT_VERSION = 2
#: Version 1 has no digests; otherwise it is the same.
READABLE_VERSIONS = (1, FORMAT_VERSION)
#: About one process that loads, not about the checkpoint.
LOADING_ATTRIBUTES = ("check_integrity", "kernels", "weight_cache")


@register_quantization_config(METHOD)
@dataclass(repr=False)
class FLIQSConfig(QuantizationConfigMixin):
    """Quantization of the layers of a vision model (see `fliqs_hf.nn.kinds`) in integer and floating-point formats.

    Three uses, by what is given:
        nothing, or formats   quantize an fp32 checkpoint while it loads; the default is uniform W8A8
        allocation            the same with a format per layer, as a search returns it
        search_space          load the trainable model whose formats can change at every step

    Args:
        allocation: layer name -> formats: an `Allocation`, its dictionary, or the path of an `allocation.json`. Layers
            that it does not name stay as they are. Excludes the format arguments below.
        weight_format: format of all weights, such as "int4", "e2m1", "fp8_e4m3" (`fliqs_hf.formats.COMMON`).
        activation_format: format of all layer inputs; None leaves them in floating point (weight-only).
        overrides: pattern -> format, or {"weight": …, "activation": …}, for layers that differ; a later pattern wins.
            Patterns are globs over module names ("*.mlp.*", "classifier") or "re:" + regular expression.
        modules_to_not_convert: patterns of layers to leave in floating point.
        search_space: formats to choose from, or the name of a space ("fliqs-s-int", "mixed", …). Excludes `overrides`
            and the format arguments. Layers that read the same tensor, such as q, k and v, share its format.
        weight_granularity: "per_channel" (output channels) or "per_tensor".
        weight_scale: "absmax", or "mse" for the scale with the least squared error.
        activation_granularity: "per_token" (per image in convolutions), "per_tensor" over the whole batch, or, in
            checkpoints of `fliqs_hf.ptq.calibrate`, "per_token_clipped" (times one factor per layer, which a
            searchable model learns) or "static" (one number per layer).
        checksum: with which saved checkpoints are bound to their configuration: "crc32" against accidents, or
            "sha256".
        check_integrity: False loads a packed checkpoint without comparing these.
        kernels: "auto" runs each packed layer with the fastest exact kernel of this machine, "reference" with the one
            that training simulates, bit for bit; see `nn/native`.
        weight_cache: for layers that no exact product takes: "decoded" keeps their weights as float32, "none" decodes
            them in every forward pass. This, `kernels` and `check_integrity` are not stored; no other argument has an
            effect on a checkpoint that is packed already.
        folded: of a packed checkpoint, convolution -> batch norm that it took in; set by `fold_batchnorm`.
        digests: of a packed checkpoint, see `hf/integrity.py`; set by the library.
        format_version: of the checkpoint layout; set by the library.

    Raises: ConfigError, FormatError, AllocationError: an unknown argument or a bad value, which they name.
    """

    allocation: Any = None
    weight_format: str = "int8"
    activation_format: str | None = "int8"
    overrides: Mapping[str, Any] | None = None
    modules_to_not_convert: list[str] | None = None
    search_space: Sequence[str] | str | None = None
    weight_granularity: str = "per_channel"
    weight_scale: str = "absmax"
    activation_granularity: str = "per_token"
    checksum: str = "crc32"
    check_integrity: bool = field(default=True, compare=False)
    kernels: Kernels = field(default="auto", compare=False)
    weight_cache: WeightCache = field(default="decoded", compare=False)
    folded: dict[str, str] | None = None
    digests: Digests | None = field(default=None, compare=False)
    format_version: int = FORMAT_VERSION
    quant_method: str = METHOD

    def __post_init__(self) -> None:
        if self.quant_method != METHOD:
            raise ConfigError(f"quant_method={self.quant_method!r} is not {METHOD!r}; this is no FLIQS configuration")
        if isinstance(self.format_version, bool) or self.format_version not in READABLE_VERSIONS:
            raise ConfigError(
                f"format_version={self.format_version!r}: this fliqs_hf reads versions up to {FORMAT_VERSION}; "
                "upgrade fliqs_hf, or quantize the original model again"
            )
        if self.format_version == 1 and self.digests is not None:
            raise ConfigError("format_version=1 has no digests; the configuration is damaged")
        self._check_types()
        if not isinstance(self.check_integrity, bool):
            raise ConfigError(f"check_integrity={self.check_integrity!r}: give True or False")
        check_kernels("kernels", self.kernels)
        check_weight_cache(self.weight_cache)
        if self.digests is not None and not (
            isinstance(self.digests, Mapping) and self.digests.keys() == {"settings", "tensors"}
        ):
            raise ConfigError(f"digests={self.digests!r:.100} are not what saving a model writes; leave them out")
        if self.folded is not None and (not isinstance(self.folded, Mapping) or self.allocation is None):
            raise ConfigError(f"folded={self.folded!r:.100} is what folding a packed model writes; leave it out")
        if not isinstance(self.checksum, str) or self.checksum not in ALGORITHMS:
            raise ConfigError(f"checksum={self.checksum!r} does not exist; choose from {', '.join(ALGORITHMS)}")
        self._check_contradictions()
        if isinstance(self.allocation, (str, Path)):
            self.allocation = Allocation.load(self.allocation)
        elif self.allocation is not None and not isinstance(self.allocation, Allocation):
            self.allocation = Allocation.from_dict(self.allocation)
        default = LayerFormats.of(self.weight_format, self.activation_format)
        if self.search_space is not None:
            parse_formats(self.search_space)
        for pattern, value in (self.overrides or {}).items():
            _override(pattern, value, default)
        settings = self.settings  # validates
        if self.allocation is None:
            settings.require_dynamic(learned=self.search_space is not None)

    def _check_types(self) -> None:
        patterns = self.modules_to_not_convert
        if patterns is not None and not isinstance(patterns, (list, tuple)):
            raise ConfigError(f"modules_to_not_convert={patterns!r}: give a list of patterns")
        if self.overrides is not None and not isinstance(self.overrides, Mapping):
            raise ConfigError(f"overrides={self.overrides!r}: give a mapping of patterns to formats")
        for name, entries in (("modules_to_not_convert", patterns or ()), ("overrides", self.overrides or ())):
            for pattern in entries:
                if not isinstance(pattern, str) or not pattern:
                    raise ConfigError(f"{name}: {pattern!r} is no pattern; give strings such as 'classifier'")

    def _check_contradictions(self) -> None:
        """Raises: ConfigError: arguments that another one leaves without a meaning."""
        if self.search_space is not None and self.allocation is not None:
            raise ConfigError("give either allocation or search_space: a model is packed or searchable, not both")
        for name, default in (("weight_format", "int8"), ("activation_format", "int8"), ("overrides", None)):
            value = getattr(self, name)
            if value == default:
                continue
            if self.allocation is not None:
                raise ConfigError(f"{name}={value!r} contradicts allocation, which says every format")
            if self.search_space is not None:
                raise ConfigError(
                    f"{name}={value!r} contradicts search_space, whose formats are chosen at every step: to fix the "
                    "formats of layers leave them out with modules_to_not_convert, or call "
                    "format_switch(model).set_allocation; to exclude formats leave them out of search_space"
                )

    @property
    def settings(self) -> QuantizerSettings:
        return QuantizerSettings(self.weight_granularity, self.weight_scale, self.activation_granularity)  # type: ignore[arg-type]

    @property
    def get_apply_tensor_subclass(self) -> Any:
        """What peft asks of a model's quantization before it puts an adapter on a layer, meant for torchao; the one
        moment at which it can be told of packed layers without importing it for everybody.

        Raises: AttributeError: always, as there is none.
        """
        register_peft()
        raise AttributeError("get_apply_tensor_subclass")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`, for what a checkpoint holds: nothing in it is opened or run.

        Raises: ConfigError: a key that does not exist, with the nearest one that does; a path in place of an
            allocation; a regular expression; anything of another type or size than `to_dict` gives.
        """
        known = [f.name for f in fields(cls) if f.name not in LOADING_ATTRIBUTES]
        for key in config_dict:
            if key not in known:
                hint = did_you_mean(key, known, f"known keys: {', '.join(known)}")
                raise ConfigError(f"unknown key {key!r} in a FLIQS quantization config{hint}")
        check_stored(config_dict)
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without what is not in force: a packed model's formats are all in `allocation`."""
        names = [f.name for f in fields(self) if f.name not in LOADING_ATTRIBUTES]
        data: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.allocation is not None:
            data["allocation"] = self.allocation.to_dict()
            del data["weight_format"], data["activation_format"]
        if self.search_space is not None:
            del data["weight_format"], data["activation_format"]
        return {key: value for key, value in data.items() if value is not None or key == "activation_format"}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What Transformers takes over from the argument of `from_pretrained` where the checkpoint has a config."""
        return {name: getattr(self, name) for name in LOADING_ATTRIBUTES}

    def resolve(self, model: Any) -> Allocation:
        """The allocation that this configuration means for `model`, in the model's names and order.

        Raises: AllocationError, ConfigError: a layer or a pattern that the model does not have.
        """
        layers = quantizable_layers(model, self.modules_to_not_convert)
        if self.allocation is not None:
            return _renamed(self.allocation, model, layers)
        if not layers:
            raise ConfigError(f"{type(model).__name__} has no layer left to quantize")
        default = LayerFormats.of(self.weight_format, self.activation_format)
        formats = dict.fromkeys(layers, default)
        for pattern, value in (self.overrides or {}).items():
            hits = [name for name in layers if matches(name, pattern)]
            if not hits:
                raise ConfigError(f"overrides: {pattern!r} matches no layer of {type(model).__name__}")
            formats.update(dict.fromkeys(hits, _override(pattern, value, default)))
        return Allocation(formats)


# Transformers asks only these classes for loading attributes, and has no call that registers one.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, FLIQSConfig)


def _override(pattern: str, value: Any, default: LayerFormats) -> LayerFormats:
    """A format for both, or a mapping with "weight", "activation" or both."""
    if isinstance(value, LayerFormats):
        return value
    if not isinstance(value, Mapping):
        return LayerFormats.of(value, value)
    if not value or set(value) - {"weight", "activation"}:
        raise ConfigError(
            f'overrides: {pattern!r}: expected a format or {{"weight": …, "activation": …}}, got {value!r}'
        )
    return LayerFormats.of(value.get("weight", default.weight), value.get("activation", default.activation))


def _renamed(allocation: Allocation, model: Any, layers: Mapping[str, nn.Module]) -> Allocation:
    """`allocation` in the names of `model`, which may be the base model of the one that it was made for, or the
    reverse; entries of a part (head, pooler) that `model` does not have are dropped then.

    Transformers names a layer `vit.layers.0…` in a model with a head and `layers.0…` in the base model.
    """
    prefix = model.base_model_prefix + "."
    architectures = model.config.architectures  # None where the model was made from a configuration
    same_class = not architectures or type(model).__name__ in architectures
    parts = {part_of(name, model) for name, _ in model.named_modules()}
    found: dict[str, LayerFormats] = {}
    for name, formats in allocation.items():
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in layers]
        if known:
            found[known[0]] = formats
        elif same_class or part_of(name, model) in parts:
            if name in quantizable_layers(model):
                raise AllocationError(f"the allocation names {name!r}, which modules_to_not_convert excludes")
            raise AllocationError(f"the allocation names {why_not(model, name)}{did_you_mean(name, layers)}")
    return Allocation({name: found[name] for name in layers if name in found})
