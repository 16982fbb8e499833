"""The fp32 model that everything starts from: a checkpoint with a head for this data set, or an untrained one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task, find_task
from fliqs_hf.training.images import resize_to
from fliqs_hf.training.labels import are_numbered, match_trained, names_of
from fliqs_hf.training.loading import load
from fliqs_hf.training.scratch import check_patches, image_side, scratch_config

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What `load_classifier` gives.

    Attributes:
        processor: of its images.
        trained: whether all of the model's weights are a checkpoint's, its head too.
    """

    model: Any
    processor: Any
    trained: bool


def load_classifier(
    names: Sequence[str],
    *,
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    model_type: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    cache_dir: str | None = None,
    task: str = IMAGE_CLASSIFICATION.name,
) -> Loaded:
    """A model of `task` over the classes `names`, and its image processor.

    A head of as many classes is kept, matched with the data set's by the rules of `training.labels`, and what nothing
    is known of in its order. Where the names are not the same, the config has the data set's; the checkpoint's stay
    where they are words and the data set has numbers or ids ("n01440764"). Both are logged.

    Args:
        model_name_or_path: a checkpoint. Its head is kept if it has as many classes, else a new one is made.
        model_revision: branch, tag or commit on the Hub.
        model_type: an architecture to train from scratch instead, such as "vit", with `config_overrides`.
        image_size: side in pixels, where it differs from the checkpoint's: the processor resizes to it and absolute
            position embeddings are interpolated once (bicubic), as is usual in fine-tuning.
        cache_dir: where downloads are kept.
        task: the name of a registered one.
    Raises: ConfigError: see `read_classifier`; the weights cannot be loaded, or not for images of that size; or the
        head that is kept is not one that chooses one of its classes.
    """
    config, processor = read_classifier(
        model_name_or_path=model_name_or_path, model_revision=model_revision, model_type=model_type,
        config_overrides=config_overrides, image_size=image_size, cache_dir=cache_dir, task=task,
    )  # fmt: skip
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    if model_type is not None:
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
        return Loaded(find_task(task).auto_class().from_config(config), processor, trained=False)
    kept = _class_names(config, names, str(model_name_or_path), find_task(task))
    if len(kept) == config.num_labels:
        find_task(task).check(config)
    else:
        config.problem_type = None  # what the old head was for
    if kept != names_of(config):
        config.num_labels = len(kept)
        config.id2label, config.label2id = dict(enumerate(kept)), {name: index for index, name in enumerate(kept)}
    model, found = load(
        find_task(task).auto_class(), str(model_name_or_path), revision=model_revision, config=config,
        ignore_mismatched_sizes=True, dtype=torch.float32, cache_dir=cache_dir, output_loading_info=True,
    )  # fmt: skip
    if image_size and getattr(config, "image_size", None) not in (None, image_size):
        model = _resized(model, image_size)
    if image_size:
        resize_to(processor, image_size)
    return Loaded(model, processor, trained=not (found["missing_keys"] or found["mismatched_keys"]))


def read_classifier(
    *,
    model_name_or_path: str | None = None,
    model_revision: str | None = None,
    model_type: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    cache_dir: str | None = None,
    task: str = IMAGE_CLASSIFICATION.name,
) -> tuple[Any, Any]:
    """Configuration and image processor of what `load_classifier` will load: what is wrong shows without weights.

    Raises: ConfigError: neither or both of checkpoint and architecture are given, there is no such or it is no image
        classifier, the model does not take three channels or images of that size, or a setting does not exist.
    """
    from transformers import AutoConfig, AutoImageProcessor, ViTImageProcessor

    if (model_name_or_path is None) == (model_type is None):
        raise ConfigError("give either model_name_or_path (a checkpoint) or model_type (training from scratch)")
    if model_type is not None:
        config = scratch_config(model_type, config_overrides or {}, image_size, task=task)
        _check_channels(config, model_type)
        side = image_side(config, image_size)
        return config, ViTImageProcessor(size={"height": side, "width": side})
    if config_overrides:
        raise ConfigError("config_overrides goes with model_type; a checkpoint has its own configuration")
    name, options = str(model_name_or_path), {"revision": model_revision, "cache_dir": cache_dir}
    config = load(AutoConfig, name, "configuration", **options)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{model_name_or_path} is quantized already; start from the fp32 checkpoint")
    if type(config) not in find_task(task).auto_class()._model_mapping:
        raise ConfigError(f"{name!r} is a model of type {config.model_type}, which is not {find_task(task).models}")
    _check_channels(config, name)
    if image_size is not None and image_size != image_side(config):
        check_patches(config, image_size)
    return config, load(AutoImageProcessor, name, "image processor", **options)


def label_ids(names: Sequence[str], model: Any) -> list[int] | None:
    """The model's class of each of the data set's, where it has them in another order, else None."""
    ids = list(match_trained(names, names_of(model.config)).ids)
    return None if ids == list(range(len(ids))) else ids


def _class_names(config: Any, names: Sequence[str], source: str, task: Task) -> list[str]:
    """Names of the classes that the checkpoint `source` is trained on with, by class; logs what does not fit."""
    own = names_of(config)
    if not task.fits_head(len(own), len(names)):
        logger.warning(
            "the head of %s has %d classes, the data set %d: a new one is made, which needs training",
            source, len(own), len(names),
        )  # fmt: skip
        return list(names)
    if not task.class_per_image:
        return own
    found = match_trained(names, own)
    if found.by == "name":
        return own
    takes = not are_numbered(names) or are_numbered(own)
    index = next(i for i, place in enumerate(found.ids) if own[place] != names[i])
    logger.warning(
        "the classes of %s are not named like the data set's and are matched by their %s: class %d is %r in the "
        "checkpoint and %r in the data set; the result has the names of the %s",
        source, "numbers" if found.by == "number" else "order", found.ids[index], own[found.ids[index]], names[index],
        "data set" if takes else "checkpoint",
    )  # fmt: skip
    return [name for _, name in sorted(zip(found.ids, names, strict=True))] if takes else own


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
