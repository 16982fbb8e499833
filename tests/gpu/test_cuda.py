"""On a GPU: the same bits as on the CPU, and a search step that never waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.formats import COMMON, Format
from fliqs_hf.formats.packing import pack, unpack
from fliqs_hf.formats.rounding import decode, encode, round_to_format
from fliqs_hf.nn import make_searchable, pack_model, quantizable_layers
from fliqs_hf.quant import quantize_activation, quantize_weight
from fliqs_hf.search import OneShotSearch, SearchConfig, SearchSpace
from fliqs_hf.search.hook import SearchHook
from tests.models import images, tiny

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fmt", COMMON, ids=str)
def test_quantizing_gives_the_bits_of_the_cpu(fmt: Format) -> None:
    x = torch.randn(64, 33, 48, generator=torch.Generator().manual_seed(0)) * 3
    for quantize in (lambda t: quantize_activation(t, fmt, "linear"), lambda t: quantize_weight(t, fmt)):
        assert torch.equal(quantize(x.cuda()).cpu(), quantize(x))
    codes = encode(x, fmt)
    assert torch.equal(round_to_format(x.cuda(), fmt).cpu(), round_to_format(x, fmt))
    assert torch.equal(encode(x.cuda(), fmt).cpu(), codes)
    packed = pack(codes.flatten().cuda(), fmt.bits)
    assert torch.equal(packed.cpu(), pack(codes.flatten(), fmt.bits))
    assert torch.equal(decode(unpack(packed, fmt.bits, x.numel()), fmt).cpu(), decode(codes.flatten(), fmt))


def test_packed_equals_searchable() -> None:
    model = tiny("vit").cuda()
    allocation = Allocation.uniform(quantizable_layers(model), "e2m2", "int5")
    packed = copy.deepcopy(model)
    pack_model(packed, allocation)
    make_searchable(model, ["e2m2", "int5"]).set_allocation(allocation)
    with torch.no_grad():
        assert torch.equal(packed(images().cuda()).logits, model(images().cuda()).logits)


def test_a_search_step_does_not_wait_for_the_device() -> None:
    model = tiny("vit").cuda().train()
    layers = trace_layers(model)
    space = SearchSpace(layers, "mixed")
    config = SearchConfig(prior="none", explore_fraction=1.0)
    table = CostTable(layers, space.formats)
    search = OneShotSearch(space, table, Target.of(target_bits=4), config, 10, device="cuda")
    groups = {layer.name: layer.input_group for layer in layers}
    switch = make_searchable(model, space.formats, names=[layer.name for layer in layers], input_groups=groups)
    hook = SearchHook(search, switch)
    x, labels = images(8).cuda(), (torch.arange(8) % 5).cuda()

    def step(number: int) -> None:
        hook.begin_step(number)[0]()
        loss = model(x, labels=labels).loss
        loss.backward()
        hook.end_step(number, -loss.detach()[None])

    step(0)  # the first step makes tensors on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
