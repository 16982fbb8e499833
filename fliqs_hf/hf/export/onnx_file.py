"""A packed model as an ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.export.forms import LayerForm, OnnxSettings, layer_form
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.optional import needed_for
from fliqs_hf.version import __version__

#: Protobuf holds 2 GiB at most: above this, weights go to a file beside it.
_MOST_BYTES = 1_800_000_000


def check_environment() -> None:
    """Raises: DependencyError: the extra "onnx" is missing."""
    with needed_for("exporting to ONNX"):
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401


def layer_forms(model: Any, settings: OnnxSettings) -> dict[str, LayerForm]:
    """What every packed layer becomes. Raises: ConfigError: `model` has none, or one that cannot be expressed."""
    layers = packed_layers(model)
    if not layers:
        raise ConfigError(f"this {type(model).__name__} has no packed layer; quantize it first")
    return {name: layer_form(name, layer, settings) for name, layer in layers.items()}


def write_onnx(
    model: Any,
    image: Tensor,
    file: Path,
    settings: OnnxSettings,
    normalization: Any = None,
) -> tuple[LayerForm, ...]:
    """Write `model`, packed and on the CPU, to `file`; large weights, or all if asked, to `<file>.data`.

    Args:
        image: pixel values [1, channels, height, width] of the size that the file is to take.
        normalization: see `preprocessing.Normalization`: then the graph takes pixels from 0 to 255.
    Returns: what became of each layer.
    Raises: DependencyError, ConfigError: it cannot be exported.
    """
    check_environment()
    import onnx_ir.passes.common

    from fliqs_hf.hf.export.rewritten import rewrite
    from fliqs_hf.hf.export.traced import trace

    forms = layer_forms(model, settings)
    layers = packed_layers(model)
    graph = trace(model, image, settings.opset)
    rewrite(graph, layers, forms, settings)
    if normalization is not None:
        normalization.put_before(graph)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(graph)  # what was folded into products
    graph.producer_name, graph.producer_version = "fliqs_hf", __version__
    graph.metadata_props["fliqs_hf"] = json.dumps(_metadata(layers, forms, settings))
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
    external = settings.external_data or size > _MOST_BYTES
    onnx_ir.save(graph, str(file), external_data=f"{file.name}.data" if external else None)
    return tuple(forms.values())


def _metadata(layers: dict[str, PackedLayer], forms: dict[str, LayerForm], settings: OnnxSettings) -> dict[str, Any]:
    """What the file was made from: allocation, how scales are made, and the form of each layer."""
    scales = {layer.settings for layer in layers.values()}
    return {
        "version": __version__, "form": settings.form, "input_scales": settings.input_scales,
        "settings": [vars(setting) for setting in scales],
        "layers": {
            name: {"weight": f.weight, "activation": f.activation, "form": f.form, "stored": f.stored}
            for name, f in forms.items()
        },
    }  # fmt: skip
