"""What the vision models of Transformers multiply with is quantized, or named as left out: every class, on "meta"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import packed_layers, quantizable_layers
from fliqs_hf.nn.kernels import set_kernels
from fliqs_hf.nn.select import left_out

TASKS = (
    "IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "UNIVERSAL_SEGMENTATION",
    "OBJECT_DETECTION", "ZERO_SHOT_IMAGE_CLASSIFICATION", "MASKED_IMAGE_MODELING", "IMAGE_TO_IMAGE",
)  # fmt: skip
PRODUCTS = {
    functional.linear, functional.bilinear, functional.conv1d, functional.conv2d, functional.conv3d,
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d, torch.matmul, torch.bmm,
    torch.mm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm,
    functional.multi_head_attention_forward,
}  # fmt: skip


def class_names() -> list[Any]:
    """Classifiers are in every run of the tests, the others in the long one."""
    names: dict[str, str] = {}
    for task in TASKS:
        for value in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            for name in value if isinstance(value, tuple) else (value,):
                names.setdefault(name, task)
    return [pytest.param(n, marks=() if names[n] == TASKS[0] else pytest.mark.slow) for n in sorted(names)]


class Multiplied(TorchFunctionMode):
    """Parameters, by name, that a product has as a factor: themselves or a view of them. Knows nothing of layers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {p.untyped_storage()._cdata: name for name, p in model.named_parameters() if p.dim() > 1}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            for value in (*args, *(kwargs or {}).values()):
                if isinstance(value, Tensor) and (name := self.names.get(value.untyped_storage()._cdata)):
                    self.found.add(name)
        return func(*args, **(kwargs or {}))


def made(name: str) -> Any:
    """On the meta device, with its default configuration. Skips what needs another library or a backbone."""
    cls = getattr(transformers, name)
    try:
        with torch.device("meta"):
            return cls(cls.config_class()).eval()
    except (ImportError, ValueError, TypeError) as error:
        pytest.skip(f"no default configuration: {' '.join(str(error).split())[:80]}")


@pytest.mark.parametrize("name", class_names())
def test_products_are_of_quantized_layers_or_named(name: str) -> None:
    model = made(name)
    quantized, reasons = quantizable_layers(model), left_out(model)
    size = next((n for c in (model.config, getattr(model.config, "vision_config", None))
                 if isinstance(n := getattr(c, "image_size", None), int)), 224)  # fmt: skip
    inputs = {"pixel_values": torch.zeros(1, 3, size, size, device="meta")}
    if getattr(model.config, "text_config", None) is not None:
        inputs["input_ids"] = torch.ones(1, 8, dtype=torch.int64, device="meta")
    try:
        layers = {layer.name: layer for layer in trace_layers(model, inputs)}
    except ConfigError:  # its forward pass reads values, or wants other inputs: what is static still holds
        layers = {}
    multiplied = Multiplied(model)
    if layers:
        with multiplied, torch.no_grad():
            model(**inputs)
        assert multiplied.found
    else:  # all matrices of modules that multiply, as far as their classes tell
        kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
        owners = {n for n, module in model.named_modules() if isinstance(module, kinds)}
        multiplied.found = {f"{n}.weight" for n in owners}
    for parameter in multiplied.found:
        layer = parameter.rpartition(".")[0]
        stays = parameter in layers or (layer in layers and not layers[layer].quantizable)
        assert layer in quantized or layer in reasons or stays, parameter
    assert not any(layers[n].quantizable for n in reasons if n in layers)


def image_gpt() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.ImageGPTConfig(n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=33, num_labels=3)
    return transformers.ImageGPTForImageClassification(config), {"input_ids": torch.arange(16)[None]}


def beit_segmentation() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.BeitConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8,
        num_labels=3, out_indices=[1, 2, 3, 4], use_auxiliary_head=False,
    )  # fmt: skip
    return transformers.BeitForSemanticSegmentation(config), {"pixel_values": torch.randn(1, 3, 32, 32)}


@pytest.mark.parametrize(("make", "kind"), [(image_gpt, "transposed_linear"), (beit_segmentation, "conv_transpose2d")])
def test_kinds_are_saved_and_loaded(make: Any, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval().save_pretrained(tmp_path / "fp32")
    quantize(model, FLIQSConfig(weight_format="int4", activation_format="int8", kernels="reference"))
    assert kind in {layer.kind.name for layer in packed_layers(model).values()}
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = type(model).from_pretrained(tmp_path / "packed")
        set_kernels(loaded, "reference")  # a choice of the machine that loads, so it is in no checkpoint
        assert torch.equal(loaded(**inputs).logits, expected)
        config = FLIQSConfig(weight_format="int4", activation_format="int8", kernels="reference")
        flown = type(model).from_pretrained(tmp_path / "fp32", quantization_config=config)  # packed as it streams in
        assert torch.equal(flown(**inputs).logits, expected)
        plain = loaded.dequantize()
        assert not packed_layers(plain) and plain(**inputs).logits.shape == expected.shape
