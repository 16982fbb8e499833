"""The allocation of a run as the config of a library that quantizes the original model itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from fliqs_hf.errors import ConfigError
from fliqs_hf.files import disk_errors, replacing
from fliqs_hf.hf.export.configs import modelopt, torchao
from fliqs_hf.hf.export.configs.counterpart import Counterpart
from fliqs_hf.pipeline.checkpoints import empty_model, read_config
from fliqs_hf.pipeline.export import RECORD, check_output
from fliqs_hf.version import __version__

Library = Literal["torchao", "modelopt"]


@dataclass(frozen=True)
class _Form:
    """Attributes: file: its name. config: of a model, an allocation and settings. text: of such a config."""

    file: str
    config: Callable[..., tuple[dict[str, Any], tuple[Counterpart, ...]]]
    text: Callable[[dict[str, Any]], str]


def _json(config: dict[str, Any]) -> str:
    return json.dumps(config, indent=1) + "\n"


def _yaml(config: dict[str, Any]) -> str:
    return modelopt.HEADER + yaml.safe_dump(config, sort_keys=False)


LIBRARIES: dict[str, _Form] = {
    "torchao": _Form(torchao.FILE, torchao.torchao_config, _json),
    "modelopt": _Form(modelopt.FILE, modelopt.modelopt_config, _yaml),
}


@dataclass(frozen=True)
class ConfigResult:
    """What was written.

    Attributes:
        files: names in `folder`, the config first.
        layers: what became of each; `changed` says what differs from the allocation and why.
    """

    folder: str
    to: Library
    files: tuple[str, ...]
    layers: tuple[Counterpart, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def export_config(run: str | Path, output: str | Path, *, to: Library, overwrite: bool = False) -> ConfigResult:
    """Write the allocation of a packed model as the config with which another library quantizes the original.

    That library makes scales and rounds weights by itself: calibration, GPTQ, rotation and trained weights of the run
    stay behind, and so does the comparison with it.

    Args:
        run: run folder, checkpoint folder or Hub id of a packed model.
        output: folder to write: torchao.json or modelopt.yaml, and a record of what became of each layer.
        overwrite: replace an earlier export; nothing else is ever replaced.
    Raises: ConfigError: no such library, no packed model, or one of which that library has no layer. AllocationError:
        a layer that the model does not have. DiskError: `output` cannot be written.
    """
    if to not in LIBRARIES:
        raise ConfigError(f"to={to!r} does not exist; choose from {', '.join(LIBRARIES)}")
    form, folder = LIBRARIES[to], Path(output)
    check_output(folder, str(run), overwrite)
    config, quantization = read_config(str(run))
    if quantization is None or quantization.search_space is not None:
        raise ConfigError(f"{str(run)!r} has no formats of fliqs_hf: run `fliqs-hf quantize` on it first")
    model = empty_model(config)
    written, layers = form.config(model, quantization.resolve(model), quantization.settings)
    result = ConfigResult(str(folder), to, (form.file, RECORD), layers)
    record = {"format_version": 1, "fliqs_hf": __version__, **result.to_dict(), "folder": None}
    with replacing(folder) as draft:
        draft.mkdir()
        with disk_errors(folder):
            (draft / form.file).write_text(form.text(written), encoding="utf-8")
            (draft / RECORD).write_text(_json(record), encoding="utf-8")
    return result
