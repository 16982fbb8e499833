"""A packed model as a file of OpenVINO: weights compressed as packed, inputs quantized by OpenVINO or as packed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import BlockFormat, Format
from fliqs_hf.hf.export.forms import LayerForm, check_expressible, storage
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.optional import needed_for
from fliqs_hf.version import __version__

Inputs = Literal["auto", "as_packed"]

_OPSET = 21
#: Narrower inputs are rounded in the graph: what a model of so few bits answers depends on it.
_RUNTIMES_BITS = 8
#: Inputs of OpenVINO's dynamic quantization share a scale in groups of so many: its own default.
_GROUP = 32
_PER_BYTE = {"INT2": 4, "INT4": 2, "FLOAT4E2M1": 2}


@dataclass(frozen=True)
class OpenVinoSettings:
    """How inputs are quantized in OpenVINO.

    Attributes:
        inputs: "auto" leaves those of at least 8 bits whose scales are dynamic to OpenVINO, which quantizes them to 8
            bits in groups of 32 where it computes in fp32, and not at all where it computes in bf16, as it does by
            itself on CPUs with units for it. "as_packed" rounds all of them in the graph as the packed layers do, but
            those of 16-bit floats.
    Raises: ConfigError: a value that does not exist.
    """

    inputs: Inputs = "auto"

    def __post_init__(self) -> None:
        if self.inputs not in get_args(Inputs):
            raise ConfigError(f"inputs={self.inputs!r} does not exist; choose from {', '.join(get_args(Inputs))}")


def check_environment() -> None:
    """Raises: DependencyError: the extra "openvino" is missing."""
    with needed_for("exporting to OpenVINO"):
        import openvino  # noqa: F401
    with needed_for("exporting to OpenVINO"):
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401


def layer_forms(model: Any, settings: OpenVinoSettings) -> dict[str, LayerForm]:
    """What every packed layer becomes. Raises: ConfigError: `model` has none, or one that cannot be expressed."""
    layers = packed_layers(model)
    if not layers:
        raise ConfigError(f"this {type(model).__name__} has no packed layer; quantize it first")
    return {name: layer_form(name, layer, settings) for name, layer in layers.items()}


def layer_form(name: str, layer: PackedLayer, settings: OpenVinoSettings) -> LayerForm:
    """Raises: ConfigError: a layer that cannot be expressed."""
    check_expressible(name, layer)
    weight, activation = layer.formats.weight, layer.formats.activation
    kind: Literal["qdq", "float", "compressed"] = "float"
    changed = ""
    if activation is None:
        kind = "compressed"
    elif layer.settings.activation_granularity == "static" and str(activation) == "int8":
        # OpenVINO moves the values of fewer levels a little.
        kind = "qdq"
    elif activation.scales_itself:
        kind, changed = (
            "compressed",
            f"inputs are left to OpenVINO: its dynamic quantization is not that of {activation}",
        )
    elif activation.bits > 8 and not activation.is_integer:
        kind, changed = "compressed", f"inputs are not rounded to {activation}: OpenVINO drops such conversions"
    elif settings.inputs == "auto" and layer.input_scale is None and activation.bits >= _RUNTIMES_BITS:
        kind = "compressed"
        changed = (
            f"inputs are left to OpenVINO: bf16, or fp32 in 8 bits by groups of {_GROUP}, instead of {activation}"
        )
    return LayerForm(name, str(weight), str(activation or "fp32"), kind, _stored(layer), changed)


def _stored(layer: PackedLayer) -> str:
    fmt, row = layer.formats.weight, layer.weight_shape[1:].numel()
    stored = stored_as(fmt)
    # OpenVINO's product for several inputs reads another number from rows that end within a byte. Those of blocks are
    # filled up, and convolutions are decoded before they run.
    inside = layer.kind.matrix and not isinstance(fmt, BlockFormat) and row % _PER_BYTE.get(stored, 1)
    return "INT8" if inside else stored


def stored_as(fmt: Format) -> str:
    """The narrowest type of OpenVINO that holds the codes of `fmt` exactly, by its name in ONNX."""
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if str(element) == "e2m1":
        return "FLOAT4E2M1"
    name, _ = storage(element, opset=25)
    return "INT8" if name == "UINT4" else name


def write_openvino(
    model: Any, image: Tensor, file: Path, settings: OpenVinoSettings, normalization: Any = None
) -> tuple[LayerForm, ...]:
    """Write `model`, packed and on the CPU, to `file` (.xml) and the .bin beside it.

    Args: as of `write_onnx`.
    Returns: what became of each layer.
    Raises: DependencyError, ConfigError: it cannot be exported.
    """
    check_environment()
    import onnx_ir
    import openvino
    from openvino.frontend.onnx import ConversionExtension

    from fliqs_hf.hf.export.inputs import InputWriter
    from fliqs_hf.hf.export.nodes import Writer
    from fliqs_hf.hf.export.openvino_layer import product
    from fliqs_hf.hf.export.traced import DOMAIN, LAYER, NODE, trace

    forms, layers = layer_forms(model, settings), packed_layers(model)
    graph = trace(model, image, _OPSET)
    writer = Writer(graph)
    inputs = InputWriter(writer, casts=())  # OpenVINO drops them, or rounds twice
    for node in list(graph.graph):
        if node.op_type == NODE:
            name = node.attributes[LAYER].as_string()
            writer.before, writer.layer = node, name
            if forms[name].form == "float":
                node.replace_input_with(0, inputs.rounded(node.inputs[0], layers[name]))
    if normalization is not None:
        normalization.put_before(graph)

    def convert(node: Any) -> Any:
        name = node.get_attribute(LAYER)
        return product(node.get_input(0), layers[name], forms[name]).outputs()

    core = openvino.Core()
    core.add_extension(ConversionExtension(NODE, DOMAIN, convert))
    with tempfile.TemporaryDirectory() as folder:
        onnx_ir.save(graph, f"{folder}/traced.onnx", external_data="traced.data")
        found = core.read_model(f"{folder}/traced.onnx")
        found.set_rt_info(json.dumps(_metadata(layers, forms, settings)), "fliqs_hf")
        found.set_rt_info(str(_group(forms)), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        openvino.save_model(found, file, compress_to_fp16=False)
    return tuple(forms.values())


def _group(forms: Mapping[str, LayerForm]) -> int:
    """Elements of an input that share a scale in OpenVINO's own quantization; 0 for none, where that would quantize
    inputs a second time, or such that are not to be quantized: it is one setting for all layers."""
    return _GROUP if all(form.form != "float" and form.activation != "fp32" for form in forms.values()) else 0


def _metadata(
    layers: Mapping[str, PackedLayer], forms: Mapping[str, LayerForm], settings: OpenVinoSettings
) -> dict[str, Any]:
    return {
        "version": __version__, "inputs": settings.inputs,
        "settings": [vars(setting) for setting in {layer.settings for layer in layers.values()}],
        "layers": {
            name: {"weight": f.weight, "activation": f.activation, "form": f.form, "stored": f.stored}
            for name, f in forms.items()
        },
    }  # fmt: skip
