"""Reading models and processors by name, with what is wrong with a name said in words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from fliqs_hf.errors import CheckpointError, ConfigError, FliqsError
from fliqs_hf.json_file import MAX_BYTES, read_object


def check_source(name: str) -> None:
    """Raises: ConfigError: `name` is no folder with a model, and cannot be the name of one on the Hub."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ConfigError(f"{name!r} names no model: give a Hub id or a folder")
    path = Path(name)
    if path.is_file():
        raise ConfigError(f"{name!r} is a file: give the folder that it is in, {str(path.parent)!r}")
    if path.exists():
        _check_folder(name, path)
        return
    local = name.startswith((".", "~", os.sep)) or name.endswith(os.sep) or path.is_absolute()
    if local or (path.parent.is_dir() and path.parent != Path()):
        raise ConfigError(f"there is no folder {name!r}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"there is no folder {name!r}, and it cannot be a Hub id (namespace/name) either") from error


def _check_folder(name: str, path: Path) -> None:
    if (path / "checkpoint" / "config.json").exists() and _is_earlier_run(path):
        raise ConfigError(
            f"{name!r} is a run folder of an earlier version, which kept the model in a folder of its own: give "
            f"{str(path / 'checkpoint')!r}"
        )
    if (path / "config.json").exists():
        _check_files(path)
        return
    if (path / "model_index.json").exists():
        raise ConfigError(
            f"{name!r} is a pipeline of several models (model_index.json), not one that Transformers loads: give the "
            "folder of an image model"
        )
    if (path / "adapter_config.json").exists():
        raise ConfigError(f"{name!r} holds an adapter only: merge it into its base model, and save that")
    inside = sorted(str(file.parent) for file in path.glob("*/config.json"))
    hint = f"; did you mean {inside[0]!r}?" if inside else ""
    raise ConfigError(f"the folder {name!r} holds no model: it has no config.json{hint}")


def _is_earlier_run(path: Path) -> bool:
    """Whether its config.json is not a model's, but one of settings."""
    try:
        config = read_object(path / "config.json")
    except CheckpointError:
        return False
    return "command" in config and "model_type" not in config


def _check_files(path: Path) -> None:
    """Raises: ConfigError: a file that Transformers would read to the end, where there is none, or into all memory."""
    for file in sorted(path.iterdir()):
        known = file.suffix in (".json", ".safetensors", ".bin")
        if known and file.exists() and not file.is_file() and not file.is_dir():
            raise ConfigError(f"{file} is no regular file: a device or a pipe is no part of a model")
        if file.suffix == ".json" and file.is_file() and file.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{file} has {file.stat().st_size:,} bytes: more than {MAX_BYTES:,} are no configuration"
            )


def load(cls: Any, name: str, what: str = "model", **options: Any) -> Any:
    """`cls.from_pretrained(name, **options)`.

    Args:
        what: it is, for the message: "model", "image processor".
    Raises: ConfigError: there is no such, or Transformers cannot read it; a revision of a folder, which has none.
        FliqsError: as our quantizer raises it.
    """
    check_source(name)
    if (revision := options.get("revision")) is not None and Path(name).exists():
        raise ConfigError(f"revision={revision!r} is of models on the Hub, and {name!r} is a folder: leave it out")
    try:
        # False, for otherwise Transformers asks on the terminal whether it may run code that comes with the model.
        return cls.from_pretrained(name, trust_remote_code=False, **options)
    except (FliqsError, MemoryError):
        raise
    except Exception as error:  # of a damaged or foreign file Transformers lets through whatever reading it raises
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{name!r} brings code of its own, which is never run: use an architecture that Transformers has"
            ) from error
        raise ConfigError(f"cannot load the {what} of {name!r}: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    """Transformers lists every architecture that it knows, or a traceback, after what it has to say."""
    text = " ".join(str(error).split()) or type(error).__name__
    end = text.find(". ", 60)
    return text if end < 0 or len(text) < 300 else text[:end]


@contextmanager
def hub_token(token: str | None) -> Iterator[None]:
    """Have every request to the Hub, of whichever library, use `token`; None leaves all as it is."""
    before = os.environ.get("HF_TOKEN")
    if token is not None:
        os.environ["HF_TOKEN"] = token
    try:
        yield
    finally:
        if token is not None:
            if before is None:
                del os.environ["HF_TOKEN"]
            else:
                os.environ["HF_TOKEN"] = before


def device_of(name: str | torch.device | None) -> torch.device:
    """Default: CUDA where there is it. Raises: ConfigError: no such device, or this machine has none."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.zeros(1, device=device).item()  # of the meta device nothing can be read
    except Exception as error:  # what a missing backend raises depends on the backend
        text = " ".join(str(error).split()).partition(". ")[0]
        raise ConfigError(f"device={str(name)!r} is not available here: {text}") from error
    if device.type == "cpu" and device.index:
        raise ConfigError(f"device={str(name)!r} does not exist: there is one CPU device, 'cpu'")
    return device
