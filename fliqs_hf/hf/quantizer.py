"""The Transformers integration: what `from_pretrained` and `save_pretrained` do with a `FLIQSConfig`.

Three ways of loading:
    packed checkpoint  packed layers take the place of plain ones before loading; the file is checked beforehand,
                       tensor by tensor, so that nothing is ever half-loaded
    on the fly         each fp32 weight is packed as it streams in, so memory never holds the whole fp32 model
    searchable         the plain model is loaded, then its layers become searchable
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import CheckpointError, ConfigError, FliqsError
from fliqs_hf.formats.spaces import parse_formats
from fliqs_hf.hf.checkpoint import check_packed_files, check_places, saved_state
from fliqs_hf.hf.config import METHOD, FLIQSConfig
from fliqs_hf.hf.integrity import Stamps, check_integrity, check_stamps, digests_of, integrity_wanted, stamps
from fliqs_hf.hf.unregistered import let_through, stop_others
from fliqs_hf.nn import make_searchable, pack_model, packed_layers, quantizable_layers, restore, unpack_model
from fliqs_hf.nn.batchnorm import expect_folded, unfold
from fliqs_hf.nn.finite import check_finite, not_finite
from fliqs_hf.nn.kernels import set_kernels
from fliqs_hf.nn.replace import Places, replace
from fliqs_hf.nn.select import left_out, matches
from fliqs_hf.nn.swap import packed_like

logger = logging.getLogger(__name__)


@register_quantizer(METHOD)
class FLIQSHfQuantizer(HfQuantizer):
    """See the module's docstring."""

    quantization_config: FLIQSConfig

    def __init__(self, quantization_config: FLIQSConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.allocation = Allocation({})
        self.folded: dict[str, str] = {}  # convolution -> batch norm that the checkpoint's has taken in
        self._stamps: Stamps = {}
        self.places: Places | None = None  # of the layers that wait for their weights
        self.reshaped: set[str] = set()  # layers for which the checkpoint has a weight of another shape
        self.failure: FliqsError | None = None  # Transformers would print what a conversion raises, and raise its own

    @property
    def searchable(self) -> bool:
        return self.quantization_config.search_space is not None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if "disk" in devices:
            raise ConfigError(f"device_map={device_map!r}: FLIQS layers cannot be offloaded to disk; use cpu or a GPU")

    def update_attn_implementation(self, config: Any) -> Any:
        # The first hook that sees the config, and the last one before Transformers reads its fusions.
        let_through(config)
        return super().update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.searchable:
            return
        if not self.pre_quantized:
            config.settings.require_dynamic()
        self.allocation = config.resolve(model)
        layers = dict(model.named_modules())
        if self.pre_quantized:
            packed = {name: packed_like(layers[name], fmts, config.settings) for name, fmts in self.allocation.items()}
            self.folded = folded_in(model, config.folded or {})
            expect_folded(model, packed, self.folded)
            replace(model, packed)
            files = list(kwargs.get("checkpoint_files") or ())
            check_places(files, model.config.name_or_path)
            self._stamps = stamps(files)
            check_packed_files(model, files)
            self._check_integrity(files)
        elif self.allocation:
            self.places = Places(model, {name: layers[name] for name in self.allocation})
            # Weights must reach the quantizer as the checkpoint has them, not rounded to the model's dtype first.
            names = "|".join(map(re.escape, self.allocation))
            strict = set(model._keep_in_fp32_modules_strict or ())
            model._keep_in_fp32_modules_strict = strict | {rf"^(?:{names})\.weight$"}

    def _check_integrity(self, files: list[str]) -> None:
        config = self.quantization_config
        if not files or not config.check_integrity or not integrity_wanted():
            return
        if config.digests is not None:
            check_integrity(files, config.to_dict(), config.digests, config.checksum)
        elif config.format_version > 1:
            raise CheckpointError("the checkpoint's config.json has lost its digests: damaged; download it again")
        else:
            warnings.warn(
                "this checkpoint was written before checkpoints had digests: damage to it may not be noticed. "
                "`save_pretrained` adds them",
                stacklevel=2,
            )

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """In files the codes are `<layer>.weight`, in memory `<layer>.weight_codes`. A process without this package
        finds a byte vector where it expects a matrix and stops, instead of running on random weights."""
        if self.searchable or not self.pre_quantized or not self.allocation:
            return weight_conversions
        prefix = re.escape(model.base_model_prefix)
        names = "|".join(re.escape(name.removeprefix(model.base_model_prefix + ".")) for name in self.allocation)
        pattern = rf"^((?:{prefix}\.)?(?:{names}))\.weight$"
        return [WeightRenaming(source_patterns=pattern, target_patterns=r"\1.weight_codes"), *weight_conversions]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        names = [*converter.target_patterns]
        if not self.searchable and any(name.endswith((".weight_scale", ".input_scale")) for name in names):
            return torch.float32
        return super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, parameter = param_name.rpartition(".")
        packs = not self.pre_quantized and parameter == "weight" and layer in self.allocation
        return packs and layer not in self.reshaped

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if self.param_needs_quantization(model, param_name):
            return self.allocation[param_name.rpartition(".")[0]].weight.effective_bits / 8
        return float(param.element_size())

    def get_quantize_ops(self) -> ConversionOps:
        return PackWeight(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _align(model)
        # Files and configs use the names that the model has in memory: saving must not translate them back.
        model._weight_conversions = []
        config = self.quantization_config
        self.places = None
        if self.failure is not None:
            raise self.failure
        if name := not_finite(model):
            raise CheckpointError(f"{name} holds NaN or infinity: the checkpoint is damaged, or its training failed")
        if self.searchable:
            names, groups = searched_layers(model, self._patterns_for(model))
            formats = parse_formats(config.search_space or ())
            make_searchable(model, formats, names=names, input_groups=groups, settings=config.settings)
            model.config.quantization_config = self.quantization_config = without_expressions(config, model)
            return model
        check_stamps(self._stamps)
        packed = packed_layers(model)
        new = [name for name in self.allocation if name not in packed]
        missing = [name for name in new if name not in self.reshaped]
        # A part that the class of the checkpoint does not have (the pooler of a base model) is new: Transformers has
        # initialised it and said so, and there is nothing to quantize.
        if missing and not (config.allocation is None and new_parts_allowed(model)):
            raise CheckpointError(
                f"the checkpoint has no weight for {missing[0]!r}"
                + (f" and {len(missing) - 1} other layers" if len(missing) > 1 else "")
                + "; give a complete checkpoint, or name new layers in modules_to_not_convert"
            )
        for name in new:
            logger.warning("%r is new, not of the checkpoint, and stays in floating point until it is trained", name)
        self.allocation = Allocation({name: formats for name, formats in self.allocation.items() if name in packed})
        for name, layer in packed.items():
            if self.pre_quantized:
                layer.check_codes(name)
        model.config.quantization_config = self.quantization_config = packed_config(
            config, self.allocation, self.folded
        )
        set_kernels(model, config.kernels, config.weight_cache)
        return model

    def _patterns_for(self, model: Any) -> list[str] | None:
        """`modules_to_not_convert`; of a checkpoint of another class, those that are about a part of `model`."""
        patterns = self.quantization_config.modules_to_not_convert
        if not (patterns and self.pre_quantized and new_parts_allowed(model)):
            return patterns
        known = [*quantizable_layers(model), *left_out(model)]
        return [pattern for pattern in patterns if any(matches(name, pattern) for name in known)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        # `save_pretrained` leaves a name in the config.
        real: torch.dtype | None = getattr(torch, str(dtype).removeprefix("torch.")) if dtype else None
        restore(model) if self.searchable else unpack_model(model, real)
        unfold(model, self.quantization_config.folded or {})
        let_through(model.config)
        model.config._is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        if self.searchable:
            return None, {}
        state = saved_state(model)
        stop_others(model.config)
        config = model.config.quantization_config = self.quantization_config
        config.digests = None  # is no part of what it is made of
        config.digests = digests_of(model, state, config.checksum)
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # a packed model with adapters (see `nn.adapters`): Trainer refuses one without

    @property
    def is_qat_trainable(self) -> bool:
        return self.searchable

    @property
    def is_compileable(self) -> bool:
        return True


def _align(model: nn.Module) -> None:
    """Copy tensors that lie unaligned in a mapped file: kernels may sum them in another order, which changes bits."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


class PackWeight(ConversionOps):
    """Turns a layer into a packed one at the moment when its fp32 weight arrives from the checkpoint."""

    def __init__(self, quantizer: FLIQSHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        quantizer, rest = self.quantizer, {}
        assert quantizer.places is not None
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.rpartition(".")[0]
            if not quantizer.param_needs_quantization(model, key):
                rest[key] = value
                continue
            layer = model.get_submodule(name)
            if weight.shape != layer.weight.shape:  # for Transformers to refuse, or to initialise if it was told so
                quantizer.reshaped.add(name)
                rest[key] = value
                continue
            packed = packed_like(layer, quantizer.allocation[name], quantizer.quantization_config.settings)
            try:
                packed.pack_(packed.kind.rows(layer, weight))
            except FliqsError as error:
                quantizer.failure = quantizer.failure or type(error)(f"{key}: {error}")
            quantizer.places.replace(name, packed)
            if missing_keys is not None:
                missing_keys.discard(key)
        return rest

    def __deepcopy__(self, memo: dict[int, Any]) -> PackWeight:
        return self


def new_parts_allowed(model: Any) -> bool:
    """Whether the model is of another class than its checkpoint, so that either may have parts of its own."""
    return type(model).__name__ not in (model.config.architectures or ())


def searched_layers(model: Any, modules_to_not_convert: list[str] | None) -> tuple[list[str], dict[str, int]]:
    """The layers that a searchable model gets formats for, and layer -> group of layers that read the same tensor.

    Groups are found by running the model on one image; where that is not possible there are none.

    Raises: ConfigError: no layer is left.
    """
    names = list(quantizable_layers(model, modules_to_not_convert))
    if not names:
        raise ConfigError(f"{type(model).__name__} has no layer left to quantize")
    try:
        traced = {layer.name: layer for layer in trace_layers(model)}
    except ConfigError as error:
        logger.warning("every layer quantizes its own input, as those that share one are not known: %s", error)
        return names, {}
    names = [name for name in names if name not in traced or traced[name].quantizable]
    return names, {name: traced[name].input_group for name in names if name in traced}


def without_expressions(config: FLIQSConfig, model: Any) -> FLIQSConfig:
    """The configuration with layer names in place of regular expressions, which nothing that is loaded may hold."""
    patterns = config.modules_to_not_convert or []
    expressions = [pattern for pattern in patterns if pattern.startswith("re:")]
    if not expressions:
        return config
    known = [*quantizable_layers(model), *left_out(model)]
    plain = [pattern for pattern in patterns if pattern not in expressions]
    plain += [name for name in known if any(matches(name, expression) for expression in expressions)]
    named = copy(config)
    named.modules_to_not_convert = plain
    return named


def packed_config(config: FLIQSConfig, allocation: Allocation, folded: Mapping[str, str] | None = None) -> FLIQSConfig:
    """The configuration of a packed model: every format spelled out."""
    return FLIQSConfig(
        allocation=allocation,
        weight_granularity=config.weight_granularity,
        weight_scale=config.weight_scale,
        activation_granularity=config.activation_granularity,
        checksum=config.checksum,
        kernels=config.kernels,
        weight_cache=config.weight_cache,
        folded=dict(folded) if folded else None,
    )


def folded_in(model: Any, folded: Mapping[str, str]) -> dict[str, str]:
    """`folded` in the names of `model`, which may be the base model of the one that was saved, or the reverse.

    Raises: CheckpointError: a module that `model` does not have.
    """
    prefix, modules = model.base_model_prefix + ".", dict(model.named_modules())

    def own(name: str) -> str:
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if not known:
            raise CheckpointError(f"the checkpoint names {name!r} as folded, which {type(model).__name__} has not")
        return known[0]

    return {own(conv): own(norm) for conv, norm in folded.items()}


def quantize(model: Any, config: FLIQSConfig | Allocation) -> Any:
    """Pack a Transformers model that is in memory, in place: what `from_pretrained(…, quantization_config=…)` does
    with a checkpoint. The result saves with `save_pretrained` and loads with `from_pretrained`.

    Args:
        model: a plain or a searchable model.
        config: an `Allocation`, or a `FLIQSConfig` with or without one.
    Returns: `model`.
    Raises: ConfigError: `config` asks for a searchable model, or `model` is not of Transformers. AllocationError: a
        layer that does not exist or cannot be quantized. FormatError: NaN or infinity in the model. The model is as it
        was then.
    """
    require_transformers(model)
    if not isinstance(config, FLIQSConfig):
        config = FLIQSConfig(allocation=config)
    if config.search_space is not None:
        raise ConfigError("quantize packs a model; a search_space needs a searchable one: use make_searchable")
    refuse_packed(model)
    check_finite(model)
    allocation = config.resolve(model)
    pack_model(model, allocation, config.settings)
    return declare_packed(model, packed_config(config, allocation))


def require_transformers(model: Any) -> None:
    """Raises: ConfigError: no model of Transformers, which alone can be saved and loaded with its formats."""
    from transformers import PreTrainedModel  # heavy, and there already where it matters

    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            f"a {type(model).__name__} is no model of Transformers; quantize a plain module with "
            "fliqs_hf.nn.pack_model(model, allocation)"
        )


def refuse_packed(model: Any) -> None:
    """Raises: ConfigError: the model has packed layers."""
    if packed_layers(model):
        raise ConfigError("the model is packed already; call model.dequantize() first")


def declare_packed(model: Any, config: FLIQSConfig) -> Any:
    """Tell Transformers that the layers of `model` are packed as `config` says, so that it can be saved.

    Returns: `model`, in evaluation mode.
    """
    quantizer = FLIQSHfQuantizer(config, pre_quantized=True)
    quantizer.allocation = config.allocation
    model.hf_quantizer = quantizer
    model.config.quantization_config = quantizer.quantization_config
    model.is_quantized, model.quantization_method, model.config._is_quantized = True, METHOD, True
    model._weight_conversions = []
    set_kernels(model, config.kernels, config.weight_cache)
    return model.eval()
