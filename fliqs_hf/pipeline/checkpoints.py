"""Models by Hub id or folder, for commands: their config, their class, and their quantized form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.hf.config import METHOD, FLIQSConfig


def checkpoint_of(name: str) -> str:
    """The checkpoint of a run folder; any other name as it is."""
    folder = Path(name) / "checkpoint"
    return str(folder) if folder.is_dir() else name


def read_config(name: str, revision: str | None = None) -> tuple[Any, FLIQSConfig | None]:
    """Model config without its quantization, and that quantization if it is ours.

    Raises: ConfigError: no such model. CheckpointError: it is quantized by another method.
    """
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the model {name!r}: {error}") from error
    data = getattr(config, "quantization_config", None)
    if data is None:
        return config, None
    if not isinstance(data, dict):
        data = data.to_dict()
    if data.get("quant_method") != METHOD:
        raise CheckpointError(f"{name} is quantized by {data.get('quant_method')!r}, not by fliqs_hf")
    del config.quantization_config
    return config, FLIQSConfig.from_dict(data)


def model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from."""
    names = getattr(config, "architectures", None) or ()
    return getattr(transformers, names[0], AutoModel) if names else AutoModel


def empty_model(config: Any) -> Any:
    """The architecture without weights, on the meta device."""
    cls = model_class(config)
    with torch.device("meta"):
        return cls.from_config(config) if cls is AutoModel else cls(config)


def load_model(name: str, revision: str | None = None) -> Any:
    """The model in evaluation mode, fp32 where it is not quantized. Raises: ConfigError: it cannot be loaded."""
    config, _ = read_config(name, revision)
    try:
        return model_class(config).from_pretrained(name, revision=revision, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        if isinstance(error, (ConfigError, CheckpointError)):
            raise
        raise ConfigError(f"cannot load the model {name!r}: {error}") from error


def load_processor(name: str, revision: str | None = None) -> Any:
    """Its image processor. Raises: ConfigError: it has none."""
    try:
        return AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} has no image processor that could be loaded: {error}") from error


def device_of(name: str | None) -> torch.device:
    """Raises: ConfigError: no such device."""
    try:
        return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"device={name!r}: {error}") from error
