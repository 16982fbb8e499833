"""LoRA adapters of the peft library on packed layers: codes stay frozen, adapters are saved apart.

peft chooses an adapter's class by the layer that it wraps, from functions of its own, and has no registry beside one
on every single `LoraConfig`. `register_peft` puts one more function before its last, once. It is called when peft
first asks a packed model for its quantization (`FLIQSConfig.get_apply_tensor_subclass`), so that neither importing
this package nor loading a model imports peft, which takes seconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.packed import PackedLayer

#: Ways to initialise an adapter that leave the weight as it is; others move a part of it into the adapter.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")


@lru_cache(maxsize=1)
def register_peft() -> None:
    """Teach peft, which must be installed, to put LoRA adapters on packed layers."""
    from peft.tuners.lora import model
    from peft.tuners.tuners_utils import BaseTunerLayer

    default, classes = model.dispatch_default, _adapters()

    def dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(layer, PackedLayer):
            _check(layer, config)
            return classes[layer.kind.lora](target, adapter_name, config=config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs)

    model.dispatch_default = dispatch


def _check(layer: PackedLayer, config: Any) -> None:
    """Raises: ConfigError: a layer that peft has no adapter for, or a LoRA that changes the weight below it."""
    if not layer.kind.lora:
        raise ConfigError(
            f"target_modules reaches a packed {layer.kind.plain.__name__} layer, for which there is no LoRA adapter: "
            "leave it out of target_modules"
        )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} moves a part of the weight into the adapter, but packed "
            f"codes are frozen: choose from {', '.join(map(repr, _INITIALISATIONS))}, or call model.dequantize() first"
        )


def _adapters() -> dict[str, type[nn.Module]]:
    """The class of an adapter for each `lora` of a kind of layers."""
    from peft.tuners import lora

    class _OnPacked:
        """What both have in common. The layer below computes as it always does; the adapter adds to its output."""

        base_layer: nn.Module

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            outputs, inputs = module.weight_shape[:2]
            return (inputs, outputs) if module.kind.matrix else (module.in_channels, module.out_channels)

        def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> None:
            if (variant := super().resolve_lora_variant(config=config, **kwargs)) is not None:  # type: ignore[misc]
                raise ConfigError(
                    f"{type(variant).__name__}: packed layers take plain LoRA only; leave out use_dora and the like, "
                    "or call model.dequantize() first"
                )

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise ConfigError(
                "an adapter cannot be merged into packed codes: the sum lies between them, and rounding it would "
                "lose most of the adapter. Keep it apart, or call dequantize() on the packed model, put the adapter "
                "on that and merge there"
            )

    class LoraPackedLinear(_OnPacked, lora.Linear):
        """A LoRA adapter on packed layers that are a matrix."""

    class LoraPackedConv2d(_OnPacked, lora.Conv2d):
        """A LoRA adapter on packed convolutions."""

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            packed: Any = self.base_layer
            # peft makes the adapter's convolutions of the class of the layer below.
            plain = packed.kind.make_plain(packed, packed.bias is not None)
            self.base_layer = plain.to_empty(device=packed.weight_codes.device).to(packed.dtype)
            try:
                super().update_layer(*args, **kwargs)
            finally:
                self.base_layer = packed

    return {"Linear": LoraPackedLinear, "Conv2d": LoraPackedConv2d}
