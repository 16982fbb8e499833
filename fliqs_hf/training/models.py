"""The fp32 model that everything starts from: a checkpoint with a head for this data set, or an untrained one."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.images import resize_to
from fliqs_hf.training.loading import load
from fliqs_hf.training.scratch import check_patches, image_side, scratch_config

logger = logging.getLogger(__name__)


def load_classifier(
    names: Sequence[str],
    *,
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    model_type: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    cache_dir: str | None = None,
) -> tuple[Any, Any]:
    """An image classifier over the classes `names`, and its image processor.

    A head of other classes in the same number is kept, index by index, with the data set's names in the config; the
    checkpoint's names stay where they are words and the data set has numbers or ids ("n01440764"). Both are logged.

    Args:
        model_name_or_path: a checkpoint. Its head is kept if it has as many classes, else a new one is made.
        model_revision: branch, tag or commit on the Hub.
        model_type: an architecture to train from scratch instead, such as "vit", with `config_overrides`.
        image_size: side in pixels, where it differs from the checkpoint's: the processor resizes to it and absolute
            position embeddings are interpolated once (bicubic), as is usual in fine-tuning.
        cache_dir: where downloads are kept.
    Raises: ConfigError: see `read_classifier`; or the weights cannot be loaded, or not for images of that size.
    """
    from transformers import AutoModelForImageClassification

    config, processor = read_classifier(
        model_name_or_path=model_name_or_path, model_revision=model_revision, model_type=model_type,
        config_overrides=config_overrides, image_size=image_size, cache_dir=cache_dir,
    )  # fmt: skip
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if model_type is not None:
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
        return AutoModelForImageClassification.from_config(config), processor
    if _takes_names(config, names, str(model_name_or_path)):
        config.num_labels = len(names)
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
    model = load(
        AutoModelForImageClassification, str(model_name_or_path), revision=model_revision, config=config,
        ignore_mismatched_sizes=True, dtype=torch.float32, cache_dir=cache_dir,
    )  # fmt: skip
    if image_size and getattr(config, "image_size", None) not in (None, image_size):
        model = _resized(model, image_size)
    if image_size:
        resize_to(processor, image_size)
    return model, processor


def read_classifier(
    *,
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    model_type: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    cache_dir: str | None = None,
) -> tuple[Any, Any]:
    """Configuration and image processor of what `load_classifier` will load: what is wrong shows without weights.

    Raises: ConfigError: neither or both of checkpoint and architecture are given, there is no such or it is no image
        classifier, the model does not take three channels or images of that size, or a setting does not exist.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

    if (model_name_or_path is None) == (model_type is None):
        raise ConfigError("give either model_name_or_path (a checkpoint) or model_type (training from scratch)")
    if model_type is not None:
        config = scratch_config(model_type, config_overrides or {}, image_size)
        _check_channels(config, model_type)
        side = image_side(config, image_size)
        return config, ViTImageProcessor(size={"height": side, "width": side})
    if config_overrides:
        raise ConfigError("config_overrides goes with model_type; a checkpoint has its own configuration")
    name, options = str(model_name_or_path), {"revision": model_revision, "cache_dir": cache_dir}
    config = load(AutoConfig, name, "configuration", **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{model_name_or_path} is quantized already; start from the fp32 checkpoint")
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise ConfigError(f"{name!r} is a model of type {config.model_type}, which is no image classifier")
    _check_channels(config, name)
    if image_size is not None and image_size != image_side(config):
        check_patches(config, image_size)
    return config, load(AutoImageProcessor, name, "image processor", **options)


def label_ids(names: Sequence[str], model: Any) -> list[int] | None:
    """The model's class of each of the data set's, where they have the same names in another order, else None."""
    ids = _matched(_own_names(model.config), names)
    return None if ids is None or ids == list(range(len(ids))) else ids


def _matched(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Where each of `names` is in `own`, None if they are not the same names.

    Case and outer blanks count only if that is what tells classes apart ("a" and "A" of letters). Names that occur
    more than once, such as ImageNet's "crane", are matched in their order.
    """
    for fold in (str, _folded):
        theirs, ours = (_numbered([fold(name) for name in part]) for part in (own, names))
        if theirs.keys() == ours.keys():
            return [theirs[key] for key in ours]
    return None


def _folded(name: str) -> str:
    return name.strip().casefold()


def _numbered(names: Sequence[str]) -> dict[tuple[str, int], int]:
    """(name, how often it came before) -> index."""
    seen: Counter[str] = Counter()
    keys = {}
    for index, name in enumerate(names):
        keys[name, seen[name]] = index
        seen[name] += 1
    return keys


def _are_ids(names: Sequence[str]) -> bool:
    """Whether the names are one prefix with numbers: "0", "n01440764", "LABEL_0"."""
    return len({re.sub(r"[0-9]+$", "", name) for name in names}) == 1 and all(name[-1:].isdigit() for name in names)


def _own_names(config: Any) -> list[str]:
    return [str(config.id2label.get(index, f"LABEL_{index}")) for index in range(config.num_labels)]


def _takes_names(config: Any, names: Sequence[str], source: str) -> bool:
    """Whether the classes of the checkpoint `source` get the names of the data set's; logs what does not fit."""
    own = _own_names(config)
    if len(own) != len(names):
        logger.warning(
            "the head of %s has %d classes, the data set %d: a new one is made, which needs training",
            source, len(own), len(names),
        )  # fmt: skip
        return True
    if _matched(own, names) is not None:
        return False
    takes = not _are_ids(names) or _are_ids(own)
    index = next(i for i, (a, b) in enumerate(zip(own, names, strict=True)) if _folded(a) != _folded(b))
    logger.warning(
        "the classes of %s are not named like the data set's and are matched by their numbers: class %d is %r in the "
        "checkpoint and %r in the data set; the result has the names of the %s",
        source, index, own[index], names[index], "data set" if takes else "checkpoint",
    )  # fmt: skip
    return takes


def _check_channels(config: Any, source: str) -> None:
    for part in (config, getattr(config, "vision_config", None)):
        channels = getattr(part, "num_channels", None)
        if channels not in (None, 3):
            raise ConfigError(
                f"{source} takes images of num_channels={channels}, but images are loaded as RGB, which has 3: choose "
                "a model with num_channels=3"
            )


def _resized(model: Any, image_size: int) -> Any:
    """The same weights in a model for square images of another size."""
    config = type(model.config).from_dict(model.config.to_dict() | {"image_size": image_size})
    resized = type(model)(config)
    target, state = resized.state_dict(), model.state_dict()
    for name, tensor in state.items():
        if name not in target or tensor.shape == target[name].shape:
            continue
        if not name.endswith("position_embeddings"):
            raise ConfigError(
                f"{type(model).__name__} cannot take images of {image_size} pixels: {name} depends on the image size"
            )
        state[name] = interpolate_positions(tensor, target[name].shape[1])
        logger.info("%s: interpolated from %d to %d positions", name, tensor.shape[1], target[name].shape[1])
    resized.load_state_dict(state)
    return resized


def interpolate_positions(embeddings: Tensor, positions: int) -> Tensor:
    """Absolute position embeddings [1, n, channels] of a square grid with 0 to 2 leading tokens, for `positions`.

    Raises: ConfigError: the numbers of positions are no squares plus the same number of leading tokens.
    """
    for leading in (1, 2, 0):
        old, new = math.isqrt(embeddings.shape[1] - leading), math.isqrt(positions - leading)
        if old * old + leading == embeddings.shape[1] and new * new + leading == positions:
            tokens, grid = embeddings[:, :leading], embeddings[:, leading:]
            grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
            grid = functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False, antialias=new < old)
            return torch.cat([tokens, grid.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)
    raise ConfigError(f"position embeddings of {embeddings.shape[1]} positions cannot be interpolated to {positions}")
