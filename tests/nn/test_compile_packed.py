"""Packed models under `torch.compile` and `torch.export`: one graph, and the bits of the reference path."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.nn.kernels import set_kernels
from tests.helpers.models import images, tiny


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def packed(weight: str, activation: str | None) -> tuple[Any, torch.Tensor]:
    """A model with automatic kernels, and its logits by the reference path."""
    model = quantize(tiny("vit"), FLIQSConfig(weight_format=weight, activation_format=activation))
    set_kernels(model, "reference")
    with torch.no_grad():
        logits = model(images()).logits
    set_kernels(model, "auto")
    return model, logits


@pytest.mark.parametrize(("weight", "activation"), [("int3", "e4m3"), ("e2m1", None)])
@torch.no_grad()
def test_one_graph_with_the_bits_of_the_reference_path(weight: str, activation: str | None) -> None:
    model, logits = packed(weight, activation)
    graphs = []

    def backend(graph: Any, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(images()).logits, logits)
    assert len(graphs) == 1


@pytest.mark.parametrize(("gradients", "strict"), [(False, True), (True, False)])
def test_an_exported_model_is_written_read_and_has_the_bits_of_the_reference_path(
    gradients: bool, strict: bool
) -> None:
    model, logits = packed("int3", "e4m3")
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, (images(),), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        assert torch.equal(torch.export.load(file).module()(images()).logits, logits)
