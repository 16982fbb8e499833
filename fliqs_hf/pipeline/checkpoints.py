"""Models by Hub id or folder, for commands: their config, their class, and their quantized form."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from fliqs_hf.cost import LayerInfo, example_image, trace_layers
from fliqs_hf.errors import ConfigError, FliqsError
from fliqs_hf.hf.config import METHOD, FLIQSConfig
from fliqs_hf.hf.export.runtime import exported_file, load_exported
from fliqs_hf.training.loading import load

#: Of a text that goes with an image; CLIP reads so many.
TEXT_TOKENS = 77


def _folder_of(name: str) -> str:
    """The folder of an exported file; any other name as it is."""
    file = exported_file(name)
    return name if file is None else str(file.parent)


def read_config(name: str, revision: str | None = None) -> tuple[Any, FLIQSConfig | None]:
    """Model config without its quantization, and that quantization if it is ours.

    Raises: ConfigError: no such model, or it is quantized by another method.
    """
    config = load(AutoConfig, _folder_of(name), "configuration", revision=revision)
    data = getattr(config, "quantization_config", None)
    if data is None:
        return config, None
    if not isinstance(data, dict):
        data = data.to_dict()
    if data.get("quant_method") != METHOD:
        raise ConfigError(f"{name} is quantized by {data.get('quant_method')!r}, not by fliqs_hf")
    del config.quantization_config
    return config, FLIQSConfig.from_dict(data)


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, where it is one of Transformers."""
    names = getattr(config, "architectures", None)
    found = getattr(transformers, str(names[0]), None) if isinstance(names, (list, tuple)) and names else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else AutoModel


def empty_model(config: Any) -> Any:
    """The architecture without weights, on the meta device. Raises: ConfigError: it cannot be built."""
    cls = model_class(config)
    try:
        with torch.device("meta"):
            return cls.from_config(config) if cls is AutoModel else cls(config)
    except Exception as error:  # each architecture fails in its own way over settings that do not work
        raise ConfigError(
            f"a config of type {config.model_type!r} makes no model ({type(error).__name__}: "
            f"{' '.join(str(error).split())})"
        ) from error


def load_model(name: str, revision: str | None = None) -> Any:
    """The model in evaluation mode, fp32 where it is not quantized; an exported file in its own runtime.

    Raises: ConfigError, CheckpointError: it cannot be loaded. DependencyError: its runtime is missing.
    """
    config, _ = read_config(name, revision)
    if (file := exported_file(name)) is not None:
        return load_exported(file, config).eval()
    return load(model_class(config), name, revision=revision, dtype=torch.float32).eval()


def load_processor(name: str, revision: str | None = None) -> Any:
    """Its image processor. Raises: ConfigError: it has none."""
    return load(AutoImageProcessor, _folder_of(name), "image processor", revision=revision)


def traced(model: Any) -> tuple[tuple[LayerInfo, ...], str]:
    """`trace_layers` of whatever model a command is given, on one image and, where it reads text as well, on a text.

    Returns: the layers, and what they were run on: "image of 224 pixels and text of 77 tokens".
    Raises: ConfigError: it takes no images, or needs something that is not known how to make.
    """
    parameters = inspect.signature(model.forward).parameters
    if "pixel_values" not in parameters:
        raise ConfigError(f"{type(model).__name__} takes no images (pixel_values), and costs are per image")
    image = example_image(model)
    inputs, on = {"pixel_values": image}, f"image of {image.shape[-1]} pixels"
    if "input_ids" in parameters:
        text = getattr(model.config, "text_config", model.config)
        tokens = min(getattr(text, "max_position_embeddings", None) or TEXT_TOKENS, TEXT_TOKENS)
        inputs["input_ids"] = torch.zeros(1, tokens, dtype=torch.int64, device=image.device)
        on += f" and text of {tokens} tokens"
    if "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.int64, device=image.device)
        on += " and text of 1 token"
    try:
        return trace_layers(model, inputs), on
    except FliqsError:
        raise
    except Exception as error:  # a forward pass of somebody else's may raise anything
        raise ConfigError(
            f"{type(model).__name__} cannot be run on an {on} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
