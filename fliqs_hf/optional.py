"""Packages that only some features need, and the extras of `pip install 'fliqs-hf[…]'` that bring them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fliqs_hf.errors import DependencyError

#: import name -> extra, as in pyproject.toml
EXTRAS = {
    "sklearn": "demo",
    "kornia": "augment",
    "matplotlib": "report",
    "statsmodels": "report",
    "optuna": "multi-trial",
    "deepspeed": "deepspeed",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
}


@contextmanager
def needed_for(what: str) -> Iterator[None]:
    """Around imports. Raises: DependencyError: one of them is not installed; it says how to install it for `what`."""
    try:
        yield
    except ImportError as error:
        raise DependencyError(f"{what} needs {install_hint(error)}", name=error.name) from error


def install_hint(error: ImportError) -> str:
    """What is missing, and how to install it: "kornia: pip install 'fliqs-hf[augment]'"."""
    package = (error.name or "").partition(".")[0]
    if package and isinstance(error, ModuleNotFoundError):
        extra = EXTRAS.get(package)
        return f"{package}: pip install " + (f"'fliqs-hf[{extra}]'" if extra else package)
    # Not missing but broken, or a library's own words about what it misses.
    text = " ".join(str(error).split())
    extra = next((EXTRAS[name] for name in EXTRAS if name in text.lower()), None)
    return text + (f" (pip install 'fliqs-hf[{extra}]')" if extra else "")
