"""What a packed model can be written as: one object for each form, with its settings and its runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.export import onnx_file, openvino_file
from fliqs_hf.hf.export.forms import LayerForm, OnnxSettings
from fliqs_hf.hf.export.openvino_file import OpenVinoSettings
from fliqs_hf.hf.export.runtime import ONNX_FILE, OPENVINO_FILE, OnnxClassifier, OpenVinoClassifier
from fliqs_hf.hf.export.torch_file import (
    TORCH_FILE,
    CompiledProgram,
    TorchProgram,
    check_compiler,
    write_aotinductor,
    write_torch,
)
from fliqs_hf.nn.kernels import set_kernels

Settings = OnnxSettings | OpenVinoSettings


@dataclass(frozen=True)
class ExportTarget:
    """A form of files.

    Attributes:
        file: its name; what belongs to it has a name that begins with the same stem.
        settings: the class of its settings, None where it has none.
        normalizes: whether the file can contain the processor's normalization.
    """

    file: str
    settings: type[Settings] | None = None
    normalizes: bool = False

    def check(self) -> None:
        """Raises: DependencyError, ConfigError: an extra, or another program, is missing."""

    def check_layers(self, model: Any, settings: Any) -> None:
        """Raises: ConfigError: a layer cannot be expressed."""

    def write(self, model: Any, image: Tensor, file: Path, settings: Any, normalization: Any) -> tuple[LayerForm, ...]:
        """As `write_onnx`."""
        raise NotImplementedError

    def load(self, file: Path, config: Any) -> Any:
        """The written file as a model that returns logits, with its size as `file_bytes`."""
        raise NotImplementedError


class _Onnx(ExportTarget):
    def check(self) -> None:
        onnx_file.check_environment()

    def check_layers(self, model: Any, settings: Any) -> None:
        onnx_file.layer_forms(model, settings)

    def write(self, model: Any, image: Tensor, file: Path, settings: Any, normalization: Any) -> tuple[LayerForm, ...]:
        return onnx_file.write_onnx(model, image, file, settings, normalization)

    def load(self, file: Path, config: Any) -> OnnxClassifier:
        return OnnxClassifier(file, config)


class _OpenVino(ExportTarget):
    def check(self) -> None:
        openvino_file.check_environment()

    def check_layers(self, model: Any, settings: Any) -> None:
        openvino_file.layer_forms(model, settings)

    def write(self, model: Any, image: Tensor, file: Path, settings: Any, normalization: Any) -> tuple[LayerForm, ...]:
        return openvino_file.write_openvino(model, image, file, settings, normalization)

    def load(self, file: Path, config: Any) -> OpenVinoClassifier:
        return OpenVinoClassifier(file, config)


class _Torch(ExportTarget):
    def write(self, model: Any, image: Tensor, file: Path, settings: Any, normalization: Any) -> tuple[LayerForm, ...]:
        set_kernels(model, "reference")
        return write_torch(model, image, file)

    def load(self, file: Path, config: Any) -> TorchProgram:
        return TorchProgram(file)


class _AotInductor(ExportTarget):
    def check(self) -> None:
        check_compiler()

    def write(self, model: Any, image: Tensor, file: Path, settings: Any, normalization: Any) -> tuple[LayerForm, ...]:
        set_kernels(model, "reference")
        return write_aotinductor(model, image, file)

    def load(self, file: Path, config: Any) -> CompiledProgram:
        return CompiledProgram(file)


TARGETS: dict[str, ExportTarget] = {
    "onnx": _Onnx(ONNX_FILE, OnnxSettings, normalizes=True),
    "openvino": _OpenVino(OPENVINO_FILE, OpenVinoSettings, normalizes=True),
    "torch": _Torch(TORCH_FILE),
    "aotinductor": _AotInductor(TORCH_FILE),
}


def find_target(to: str) -> ExportTarget:
    """Raises: ConfigError: there is none of this name."""
    if to not in TARGETS:
        raise ConfigError(f"to={to!r} does not exist; choose from {', '.join(TARGETS)}")
    return TARGETS[to]
