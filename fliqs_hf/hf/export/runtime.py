"""Exported files as models that return logits, so that whatever compares models takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.optional import needed_for

ONNX_FILE = "model.onnx"
OPENVINO_FILE = "model.xml"


def exported_file(name: str) -> Path | None:
    """The exported model that `name` is, or holds where it holds no weights of another kind; None where it is none."""
    path = Path(name)
    if path.is_file() and path.suffix in (".onnx", ".xml"):
        return path
    inside = [path / file for file in (ONNX_FILE, OPENVINO_FILE) if (path / file).is_file()]
    return inside[0] if inside and not any(path.glob("*.safetensors*")) else None


def load_exported(file: Path, config: Any = None) -> OnnxClassifier | OpenVinoClassifier:
    """`file`, of `exported_file`, in its own runtime. Raises: as that."""
    return (OpenVinoClassifier if file.suffix == ".xml" else OnnxClassifier)(file, config)


class OnnxClassifier(nn.Module):
    """An ONNX file in ONNX Runtime on the CPU: pixel values [images, channels, height, width] in, logits out.

    Attributes:
        config: of the model that it was made from, or None.
        file_bytes: size of the file, external data included.
    """

    def __init__(self, file: str | Path, config: Any = None, threads: int | None = None) -> None:
        """
        Args: threads: default: as many as torch uses.
        Raises: DependencyError: the extra "onnx" is missing. CheckpointError: the file cannot be loaded.
        """
        super().__init__()
        with needed_for("running an ONNX file"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a type of its own for each of its codes
            raise CheckpointError(f"ONNX Runtime cannot load {file}: {' '.join(str(error).split())[:300]}") from error
        names = [output.name for output in self.session.get_outputs()]
        if len(self.session.get_inputs()) != 1 or not names:
            raise ConfigError(f"{file} takes {len(self.session.get_inputs())} inputs: give a model that takes images")
        self.input, self.output = self.session.get_inputs()[0].name, "logits" if "logits" in names else names[0]
        self.config, self.name_or_path = config, os.fspath(file)
        data = Path(f"{file}.data")
        self.file_bytes = Path(file).stat().st_size + (data.stat().st_size if data.is_file() else 0)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Raises: CheckpointError: ONNX Runtime cannot run the model on them."""
        pixels = np.ascontiguousarray(pixel_values.detach().float().cpu().numpy())
        try:
            (logits,) = self.session.run([self.output], {self.input: pixels})
        except Exception as error:  # as above
            raise CheckpointError(f"ONNX Runtime stopped: {' '.join(str(error).split())[:300]}") from error
        return ImageClassifierOutput(logits=torch.from_numpy(logits))


class OpenVinoClassifier(nn.Module):
    """A file of OpenVINO on the CPU: pixel values [images, channels, height, width] in, logits out.

    Attributes: as of `OnnxClassifier`; the .bin counts.
    """

    def __init__(
        self, file: str | Path, config: Any = None, threads: int | None = None, precision: str | None = None
    ) -> None:
        """
        Args:
            threads: default: as many as torch uses.
            precision: what is computed in, "f32" or "bf16"; default: what OpenVINO takes by itself, which is bf16 on
                CPUs with units for it.
        Raises: DependencyError: the extra "openvino" is missing. CheckpointError: the file cannot be loaded.
        """
        super().__init__()
        with needed_for("running a file of OpenVINO"):
            import openvino
        properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        if precision is not None:
            properties["INFERENCE_PRECISION_HINT"] = precision
        try:
            self.compiled = openvino.Core().compile_model(os.fspath(file), "CPU", properties)
        except RuntimeError as error:
            raise CheckpointError(f"OpenVINO cannot load {file}: {' '.join(str(error).split())[:300]}") from error
        if len(self.compiled.inputs) != 1:
            raise ConfigError(f"{file} takes {len(self.compiled.inputs)} inputs: give a model that takes images")
        self.output = next((out for out in self.compiled.outputs if "logits" in out.names), self.compiled.outputs[0])
        self.config, self.name_or_path = config, os.fspath(file)
        weights = Path(file).with_suffix(".bin")
        self.file_bytes = Path(file).stat().st_size + (weights.stat().st_size if weights.is_file() else 0)

    @property
    def precision(self) -> str:
        """What it computes in: "f32", "bf16"."""
        return str(self.compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Raises: CheckpointError: OpenVINO cannot run the model on them."""
        pixels = np.ascontiguousarray(pixel_values.detach().float().cpu().numpy())
        try:
            logits = self.compiled([pixels])[self.output]
        except RuntimeError as error:
            raise CheckpointError(f"OpenVINO stopped: {' '.join(str(error).split())[:300]}") from error
        return ImageClassifierOutput(logits=torch.tensor(logits))
