"""A packed model as a program of `torch.export`, or that compiled, which torch runs without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.export.forms import LayerForm
from fliqs_hf.nn import packed_layers

TORCH_FILE = "model.pt2"


class _Logits(nn.Module):
    """Pixel values in, logits out: a program cannot return what Transformers returns without importing it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        first: Tensor = self.model(pixel_values=pixel_values, return_dict=False)[0]
        return first


def write_torch(model: Any, image: Tensor, file: Path) -> tuple[LayerForm, ...]:
    """Write `model`, packed and in evaluation mode, to `file`: its reference path, with its weights as packed codes.

    Args: image: pixel values [1, channels, height, width] of the size that the program is to take, in any number.
    Returns: what became of each layer.
    Raises: ConfigError: it cannot be traced.
    """
    torch.export.save(_program(model, image), file)
    return _forms(model)


def check_compiler() -> None:
    """Raises: ConfigError: Inductor finds no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ConfigError(
            "AOTInductor needs a C++ compiler, and there is none: install g++ or clang++, or name one in the "
            "environment variable CXX"
        ) from error


def write_aotinductor(model: Any, image: Tensor, file: Path) -> tuple[LayerForm, ...]:
    """Write the program of `write_torch`, compiled for CPUs with the instruction sets of this one.

    Args, returns: as of `write_torch`.
    Raises: ConfigError: it cannot be traced or compiled, or there is no compiler.
    """
    check_compiler()
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(_program(model, image), package_path=str(file))
    except RuntimeError as error:  # Inductor's own are of these
        text = " ".join(str(error).split())[:400]
        raise ConfigError(f"AOTInductor cannot compile {type(model).__name__}: {text}") from error
    return _forms(model)


def _program(model: Any, image: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=2**16)
    images = image.repeat(2, 1, 1, 1)  # compilers keep strides: those of an expanded batch say that all are one image
    try:
        program = torch.export.export(_Logits(model).eval(), (images,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # TorchDynamo's own are of these
        text = " ".join(str(error).split())[:400]
        raise ConfigError(f"torch.export cannot trace {type(model).__name__}: {text}") from error
    for name, value in program.state_dict.items():  # a graph of inference, which would fail where gradients are on
        if isinstance(value, nn.Parameter):
            program.state_dict[name] = nn.Parameter(value.detach(), requires_grad=False)
    return program


def _forms(model: Any) -> tuple[LayerForm, ...]:
    return tuple(
        LayerForm(name, str(layer.formats.weight), str(layer.formats.activation or "fp32"), "reference", "packed", "")
        for name, layer in packed_layers(model).items()
    )


class TorchProgram(nn.Module):
    """A program that `write_torch` has just written. Not for files of others."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.program = torch.export.load(file).module()
        self.file_bytes = file.stat().st_size

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        return ImageClassifierOutput(logits=self.program(pixel_values))


class CompiledProgram(nn.Module):
    """A package that `write_aotinductor` has just written. It is machine code: not for files of others."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.program = torch._inductor.aoti_load_package(str(file))
        self.file_bytes = file.stat().st_size

    def forward(self, pixel_values: Tensor) -> Any:
        return self.program(pixel_values)
