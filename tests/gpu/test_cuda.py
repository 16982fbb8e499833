"""On a GPU: the same bits as on the CPU, and a search step that never waits for the device."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.formats import COMMON, Format
from fliqs_hf.formats.packing import pack, unpack
from fliqs_hf.formats.rounding import decode, encode, round_to_format
from fliqs_hf.nn import FormatSwitch, make_searchable, pack_model, quantizable_layers
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.quant import ROW, quantize_activation, quantize_weight
from fliqs_hf.selection import SearchProblem, SearchSpace, TwoPass, fisher_scores
from fliqs_hf.training import TrainConfig, train
from tests.helpers.models import images, tiny
from tests.training.test_loop import Blobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("fmt", COMMON, ids=str)
def test_quantizing_gives_the_bits_of_the_cpu(fmt: Format) -> None:
    x = torch.randn(64, 33, 48, generator=torch.Generator().manual_seed(0)) * 3
    for quantize in (lambda t: quantize_activation(t, fmt, ROW), lambda t: quantize_weight(t, fmt)):
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


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_sensitivities_are_those_of_the_cpu(architecture: str) -> None:
    """First and second look. Convolutions may use TF32, whose factors keep 10 bits, and scores are squares of sums."""
    labels = torch.arange(16) % 5
    space = SearchSpace(trace_layers(tiny(architecture), images(1)), "mixed")
    problem = SearchProblem(space, CostTable(space.layers, space.formats), Target.of(target_bits=4))
    found = []
    for device in ("cpu", "cuda"):
        model = tiny(architecture).to(device)
        batches = [(images(16).to(device), labels.to(device))]
        first = fisher_scores(model, batches, lambda x, model=model: model(x).logits, space)
        once = found[0][0] if found else first  # the second look depends on an allocation: let it be the same
        again = TwoPass(once)(model, batches, lambda x, model=model: model(x).logits, problem)
        found.append((first, again))
    for cpu, cuda in zip(*found, strict=True):
        largest = cpu.decision_scores.amax(1, keepdim=True)
        torch.testing.assert_close(cuda.decision_scores / largest, cpu.decision_scores / largest, rtol=0, atol=0.02)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_search_by_the_loop_ends_and_resumes(precision: str, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision)
    assert accelerator.device.type == "cuda"

    def run(steps: int, resume: bool = False) -> tuple[OneShotSearch, torch.nn.Module]:
        model = tiny("vit").cuda()
        layers = trace_layers(model)
        space = SearchSpace(layers, ["int3", "int4", "e2m1", "int8"])
        table, config = CostTable(layers, space.formats), SearchConfig(explore_fraction=0.5, samples_per_step=2)
        search = OneShotSearch(SearchProblem(space, table, Target.of(target_bits=4)), config, 12, device="cuda")
        search.start_from(torch.rand(len(space.decisions), 4, generator=torch.Generator().manual_seed(0)))
        groups = {layer.name: layer.input_group for layer in layers}
        switch = make_searchable(model, space.formats, names=list(groups), input_groups=groups)
        settings = TrainConfig(
            max_steps=12, batch_size=8, learning_rate=1e-3, save_steps=4, gradient_accumulation_steps=2
        )
        hook = Stopping(search, switch, steps)
        try:
            return search, train(
                model, Blobs(64), settings, accelerator, hook=hook, state_folder=tmp_path, resume=resume
            )  # fmt: skip
        except KeyboardInterrupt:
            return search, model

    search, model = run(12)
    assert search.finalize().cost_ratio <= 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    shutil.rmtree(tmp_path)
    run(9)
    resumed, _ = run(12, resume=True)
    assert resumed.finalize().allocation == search.finalize().allocation


class Stopping(SearchHook):
    def __init__(self, search: OneShotSearch, switch: FormatSwitch, steps: int) -> None:
        super().__init__(search, switch)
        self.steps = steps

    def end_step(self, step: int, quality: torch.Tensor) -> dict[str, torch.Tensor]:
        if step + 1 == self.steps < 12:
            raise KeyboardInterrupt
        return super().end_step(step, quality)


def test_a_search_step_does_not_wait_for_the_device() -> None:
    model = tiny("vit").cuda().train()
    layers = trace_layers(model)
    space = SearchSpace(layers, "mixed")
    config = SearchConfig(prior="none", explore_fraction=1.0)
    table = CostTable(layers, space.formats)
    search = OneShotSearch(SearchProblem(space, table, Target.of(target_bits=4)), config, 10, device="cuda")
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
