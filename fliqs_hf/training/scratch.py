"""Untrained models by architecture: their settings, checked by building and running the model without memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fliqs_hf.errors import ConfigError, did_you_mean
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, find_task

#: What the data set decides, or `load_classifier` itself.
_DECIDED = {
    "num_labels": "the classes are those of the data set",
    "id2label": "the classes are those of the data set",
    "label2id": "the classes are those of the data set",
    "model_type": "it is an argument of its own",
    "architectures": "it is an image classifier",
    "return_dict": "training needs outputs by name",
    "dtype": "training starts in float32",
    "torch_dtype": "training starts in float32",
    "problem_type": "the loss is that of one class per image",
    "quantization_config": "the search decides the formats",
}


def scratch_config(
    model_type: str,
    overrides: Mapping[str, Any],
    image_size: int | None,
    num_labels: int = 2,
    task: str = IMAGE_CLASSIFICATION.name,
) -> Any:
    """The configuration of an untrained model of `task`.

    The model is built on the meta device and run on one image, so a setting that cannot work is refused before there
    are data or memory for it.

    Args:
        image_size: side in pixels. Architectures for any size, such as ResNet, have no such setting: only the image
            processor gets it.
    Raises: ConfigError: an architecture or setting that does not exist, or that does not work.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    mapping, wanted = find_task(task).auto_class()._model_mapping, find_task(task).models

    if model_type not in CONFIG_MAPPING:
        raise ConfigError(f"model_type={model_type!r} does not exist{did_you_mean(model_type, CONFIG_MAPPING)}")
    known = AutoConfig.for_model(model_type)
    if type(known) not in mapping:
        some = ", ".join(sorted(config.model_type for config in mapping)[:5])
        raise ConfigError(f"model_type={model_type!r} is not {wanted}: choose one such as {some}")
    classes = mapping[type(known)]
    cls = classes[0] if isinstance(classes, tuple) else classes  # of DeiT's two, that without a distillation token
    changes = _with_size(known, overrides, image_size)
    _check_settings(model_type, known, changes)
    given = {**changes, **({"image_size": image_size} if image_size else {})}
    shown = f"model_type={model_type!r}" + (f" with {given!r}" if given else "")
    try:
        config = AutoConfig.for_model(model_type, **changes, num_labels=num_labels, architectures=[cls.__name__])
    except Exception as error:  # each architecture's own checks, of which Transformers types none
        raise ConfigError(f"{shown} cannot be: {' '.join(str(error).split())}") from error
    _check_heads(config)
    if image_size is not None:
        check_patches(config, image_size)
    side = image_side(config, image_size)
    if not isinstance(side, int) or side < 1:
        raise ConfigError(f"image_size={side!r} of {model_type} must be one whole number of pixels, at least 1")
    _run_once(cls, config, side, shown)
    return config


def image_side(config: Any, image_size: int | None = None) -> Any:
    """The side of its square images in pixels: as asked for, as its config or vision config says, else 224."""
    found = [getattr(part, "image_size", None) for part in (config, getattr(config, "vision_config", None))]
    side = image_size or next((size for size in found if size is not None), 224)
    return side[0] if isinstance(side, (list, tuple)) and len(set(side)) == 1 else side


def check_patches(config: Any, image_size: int) -> None:
    """Raises: ConfigError: a side that the patches of a plain ViT do not divide: the last pixels would not be seen."""
    for part in (config, getattr(config, "vision_config", None)):
        patch: Any = getattr(part, "patch_size", None)
        plain = isinstance(patch, int) and patch > 0 and hasattr(part, "hidden_size") and not hasattr(part, "depths")
        if plain and image_size % patch:
            raise ConfigError(f"image_size={image_size} is no multiple of patch_size={patch}")


def _with_size(known: Any, overrides: Mapping[str, Any], image_size: int | None) -> dict[str, Any]:
    changes = dict(overrides)
    if image_size is None:
        return changes
    if overrides.get("image_size", image_size) != image_size:
        raise ConfigError(
            f"image_size={image_size} contradicts config_overrides: image_size={overrides['image_size']!r}: give one"
        )
    if hasattr(known, "image_size"):
        changes["image_size"] = [image_size] * 2 if isinstance(known.image_size, (list, tuple)) else image_size
    elif hasattr(getattr(known, "vision_config", None), "image_size"):
        changes["vision_config"] = {**(changes.get("vision_config") or {}), "image_size": image_size}
    return changes


def _check_settings(model_type: str, known: Any, changes: Mapping[str, Any]) -> None:
    settings = [*known.to_dict(), *known.attribute_map]
    for key, value in changes.items():
        if key in _DECIDED:
            raise ConfigError(f"config_overrides: leave {key}={value!r} out: {_DECIDED[key]}")
        if key not in settings:
            hint = did_you_mean(key, settings)
            raise ConfigError(f"config_overrides: {model_type} has no setting {key!r}{hint}")
        default = getattr(known, key)
        values = value if isinstance(value, list) else [value]
        numbers = [item for item in values if isinstance(item, (int, float)) and not isinstance(item, bool)]
        if isinstance(default, (int, float, list, tuple)) and not isinstance(default, bool):
            least = 1 if _is_extent(key) else 0 if not isinstance(default, int) or default >= 0 else None
            for item in numbers:
                if least is not None and item < least:
                    raise ConfigError(f"config_overrides: {key}={value!r} of {model_type} must be at least {least}")


def _is_extent(key: str) -> bool:
    """Whether a setting says how large something is that a model cannot be without."""
    return key.endswith(("_size", "_sizes", "_layers", "_heads", "_channels", "_dim", "_dims", "depths"))


def _check_heads(config: Any) -> None:
    for part in (config, getattr(config, "vision_config", None)):
        width, heads = getattr(part, "hidden_size", None), getattr(part, "num_attention_heads", None)
        if isinstance(width, int) and isinstance(heads, int) and heads > 0 and width % heads:
            raise ConfigError(f"config_overrides: num_attention_heads={heads} must divide hidden_size={width}")


def _run_once(cls: Any, config: Any, side: int, shown: str) -> None:
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = cls(config)
            image = torch.zeros(1, getattr(config, "num_channels", None) or 3, side, side)
        with torch.no_grad():
            model.eval()(pixel_values=image)
    except Exception as error:  # a model that cannot be built or run may raise anything
        if "meta" in str(error).lower():  # its forward pass reads values: it has none here, and may be sound
            return
        raise ConfigError(
            f"{shown} makes no model that takes images of {side} × {side} pixels "
            f"({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
