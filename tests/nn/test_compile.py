"""Searchable models under `torch.compile`: one graph, whatever the formats, and the numbers of eager execution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional

from fliqs_hf.cost import trace_layers
from fliqs_hf.formats import parse
from fliqs_hf.nn import QuantizerSettings, make_searchable
from fliqs_hf.nn.swap import format_switch
from fliqs_hf.quant import ROW, fake_quantize, grid_params, quantize_activation, quantize_weight
from fliqs_hf.quant.grid import GridParams, format_table, leading_power
from tests.helpers.models import images, tiny

FORMATS = ("int2", "int4", "e2m1", "e4m3", "bf16")


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def searchable(architecture: str, **settings: Any) -> Any:
    model = tiny(architecture).train()
    layers = trace_layers(model)
    groups = {layer.name: layer.input_group for layer in layers}
    make_searchable(model, FORMATS, names=list(groups), input_groups=groups, settings=QuantizerSettings(**settings))
    return model


def step(model: Any, run: Any, index: int) -> list[torch.Tensor]:
    """Logits and gradients with every layer in format number `index`."""
    switch = format_switch(model)
    chosen = torch.full((len(switch.names),), index)
    switch.set(chosen, chosen)
    model.zero_grad()
    logits = run(images(4)).logits
    functional.cross_entropy(logits, torch.arange(4) % 5).backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("architecture", "backend", "granularity"),
    [
        ("vit", "eager", "per_token"),
        ("vit", "aot_eager", "per_token"),
        ("vit", "aot_eager", "per_tensor"),
        ("vit", "aot_eager", "per_token_clipped"),
        ("resnet", "aot_eager", "per_token"),
    ],
)
def test_one_graph_serves_all_formats_with_the_bits_of_eager_execution(
    architecture: str, backend: str, granularity: str
) -> None:
    model = searchable(architecture, activation_granularity=granularity)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for index in range(len(FORMATS)):
            for own, wanted in zip(step(model, compiled, index), step(eager, eager, index), strict=True):
                assert torch.equal(own, wanted)


def test_a_searchable_model_has_no_graph_breaks_and_five_numbers_per_layer_are_no_inputs() -> None:
    model = searchable("vit")
    explained = torch._dynamo.explain(model)(images(4))
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    inputs = [node for node in explained.graphs[0].graph.nodes if node.op == "placeholder"]
    assert len(inputs) == len(list(model.parameters())) + 2  # images, and the formats of all layers


def test_moved_and_copied_models_are_compiled_once() -> None:
    for model in (copy.deepcopy(searchable("vit")), searchable("vit").to(torch.float32)):
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(model, compiled, 0)
            step(model, compiled, 1)


def test_leading_power_is_exact_for_every_mantissa() -> None:
    mantissas = torch.arange(2**23, dtype=torch.int32)
    for exponent in (1, 2, 100, 127, 150, 230):
        y = (mantissas | exponent << 23).view(torch.float32)
        assert bool((leading_power(y) == 2.0 ** (exponent - 127)).all())
        assert bool((leading_power(-y) == 2.0 ** (exponent - 127)).all())
    subnormal = leading_power(mantissas.view(torch.float32))  # below the smallest normal of every format
    assert bool((subnormal <= 2.0**-126).all())
    assert leading_power(torch.tensor(torch.nan)).isnan()


def compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return str(get_cpp_compiler())
    except InvalidCxxCompiler:
        return ""


needs_compiler = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")


@needs_compiler
def test_fused_fake_quantization_has_the_bits_of_eager_execution() -> None:
    table = format_table([parse(name) for name in FORMATS])
    row = table[0].clone()

    def quantize(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fmt = GridParams(*row.unbind())
        return quantize_activation(x, fmt, ROW), quantize_weight(weight, fmt)

    compiled = torch.compile(quantize, fullgraph=True, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 17, 40, generator=generator) * 2.0 ** torch.arange(-60, 60, 120 / 17).view(-1, 1).round()
    x[0, 0], x[1, 1, 3], x[1, 2, 4] = 0, torch.nan, torch.inf
    x[0, 3] = torch.arange(40) / 4 - 5  # midpoints
    weight = torch.randn(24, 40, generator=generator)
    gradient = torch.randn(2, 17, 40, generator=generator)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, data in zip(FORMATS, table, strict=True):
            row.copy_(data)
            own = x.clone().requires_grad_()
            values, weights = compiled(own, weight)
            values.backward(gradient)
            fmt = grid_params(parse(name))
            assert torch.equal(values.nan_to_num(7e30), quantize_activation(x, fmt, ROW).nan_to_num(7e30)), name
            assert torch.equal(weights, quantize_weight(weight, fmt)), name
            assert torch.equal(own.grad, gradient)


@needs_compiler
def test_the_gradient_of_a_learned_scale_compiles() -> None:
    fmt = grid_params(parse("e2m1"))
    x, scale = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)), torch.full((6, 1), 0.1)
    gradients = []
    for run in (fake_quantize, torch.compile(fake_quantize, fullgraph=True)):
        own = [tensor.clone().requires_grad_() for tensor in (x, scale)]
        values = run(own[0], own[1], fmt)
        values.backward(x)
        gradients.append((values.detach(), own[0].grad, own[1].grad))
    eager, compiled = gradients
    assert torch.equal(eager[0], compiled[0]) and torch.equal(eager[1], compiled[1])
    # Sums of 40 float32 in another order.
    assert torch.allclose(eager[2], compiled[2], rtol=1e-5, atol=1e-5)
