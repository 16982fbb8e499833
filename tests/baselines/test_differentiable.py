"""Differentiable search: the mixture, its gradients and cost, the allocation, resuming, and what it costs."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines import DifferentiableConfig, differentiable_search
from fliqs_hf.baselines.differentiable import DifferentiableSearch
from fliqs_hf.baselines.mixture import Mixture
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.errors import CheckpointError, ConfigError, TargetError
from fliqs_hf.nn import FormatSwitch, QuantizerSettings, make_searchable
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training import TrainConfig, train
from tests.helpers.models import images, tiny
from tests.helpers.networks import LONE
from tests.training.test_loop import Blobs

FORMATS = ("int2", "int4", "e2m1", "int8")
TARGET = Target.of(target_bits=4)


def mixed(
    architecture: str = "vit", formats: Any = FORMATS, settings: QuantizerSettings | None = None, **space: Any
) -> tuple[nn.Module, SearchSpace, FormatSwitch, Mixture]:
    model = tiny(architecture)
    layers = trace_layers(model)
    found = SearchSpace(layers, formats, **space)
    groups = {layer.name: layer.input_group for layer in layers}
    names = [layer.name for layer in layers]
    switch = make_searchable(model, formats, names=names, input_groups=groups, settings=settings)
    return model, found, switch, Mixture(model, found, switch)


def one_hot(space: SearchSpace, seed: int) -> tuple[Tensor, Allocation]:
    generator = torch.Generator().manual_seed(seed)
    choice = torch.rand(len(space.decisions), len(space.formats), generator=generator)
    choice = choice.masked_fill(~space.allowed, -1).argmax(-1)
    return nn.functional.one_hot(choice, len(space.formats)).float(), space.allocation(choice)


@pytest.mark.parametrize("settings", [QuantizerSettings(), QuantizerSettings("per_tensor", "mse", "per_tensor")])
@pytest.mark.parametrize("architecture", ["vit", "mobilenet_v2"])
def test_a_one_hot_mixture_is_the_layer_in_that_format_bit_for_bit(
    architecture: str, settings: QuantizerSettings
) -> None:
    model, space, switch, mixture = mixed(architecture, settings=settings)
    x = images(2)
    for seed in range(3):
        probabilities, allocation = one_hot(space, seed)
        mixture.set(probabilities)
        got = model(x).logits
        mixture.set(None)
        switch.set_allocation(allocation)
        assert torch.equal(got, model(x).logits)  # 1·y + 0·z is y exactly


def test_a_mixture_of_two_formats_is_the_mean_of_the_outputs() -> None:
    model, space, switch, mixture = mixed("vit")
    layer = model.get_submodule(space.layers[1].name)
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    mixture.set(torch.tensor([0.0, 0.25, 0.0, 0.75]).expand(len(space.decisions), -1))
    got = layer(x)
    mixture.set(None)
    parts = []
    for fmt in (space.formats[1], space.formats[3]):
        switch.set_allocation(Allocation.uniform([layer.name for layer in space.layers], fmt))
        parts.append(layer(x.detach().clone()))
    assert torch.allclose(got, 0.25 * parts[0] + 0.75 * parts[1], atol=1e-6)  # float32, sums in another order
    got.sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None


def test_excluded_formats_are_not_computed() -> None:
    model, space, _, mixture = mixed("vit", exclude={"*": ["int2"]})
    search = DifferentiableSearch(
        SearchProblem(space, CostTable(space.layers, space.formats), TARGET), DifferentiableConfig(), 10
    )
    p = search.probabilities(0)
    assert torch.equal(p[:, 0], torch.zeros(len(p))) and torch.allclose(p.sum(-1), torch.ones(len(p)))
    with torch.no_grad():
        p[:, 0] = math.nan  # would spread if it were read
        mixture.set(p)
        assert model(images(1)).logits.isfinite().all()
    assert not {fmt.name for pair in search.finalize().allocation.values() for fmt in (pair.weight,)} & {"int2"}


def test_removing_the_mixture_leaves_searchable_layers() -> None:
    model, space, switch, mixture = mixed("vit")
    fresh = tiny("vit")
    make_searchable(fresh, FORMATS)
    mixture.remove()
    mixture.remove()
    assert [type(m) for m in model.modules()] == [type(m) for m in fresh.modules()]
    layer = model.get_submodule(space.layers[0].name)
    assert not {"mixture", "decision", "allowed", "shared_inputs"} & set(vars(layer))
    assert layer.switch is switch


@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
def test_gradients_of_the_logits(relaxation: str) -> None:
    """Against the closed form: dL/dlogit_k = p_k/T·(v_k − Σ_j p_j v_j), with v_k = Σ grad·output of branch k.

    The same v serve both relaxations: what they differ in is p. Finite differences of the loss with respect to p (the
    output is linear in it, so a difference of 1 is exact up to rounding) give v independently of autograd.
    """
    model, space, _, mixture = mixed("vit")
    model.double()
    config = DifferentiableConfig(relaxation=relaxation, temperature_start=2.0, temperature_end=0.5)  # type: ignore[arg-type]
    search = DifferentiableSearch(
        SearchProblem(space, CostTable(space.layers, space.formats), TARGET), config, 10, seed=3
    )
    with torch.no_grad():
        search.policy.logits.copy_(torch.randn(search.policy.logits.shape))
    step, decision = 1, len(space.decisions) - 1  # the classifier: logits of the model are linear in its p
    x, weights = images(2).double(), torch.randn(2, 5, dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        mixture.set(p)
        return (model(x).logits * weights).sum()

    p = search.probabilities(step)
    loss(p.double()).backward()
    got = search.policy.logits.grad
    assert got is not None and (got.abs().sum(-1) > 0).all()
    detached = p.detach().double()
    with torch.no_grad():
        base = float(loss(detached))
        v = torch.zeros(len(FORMATS), dtype=torch.float64)
        for k in range(len(FORMATS)):
            moved = detached.clone()
            moved[decision, k] += 1
            v[k] = float(loss(moved)) - base
    row = detached[decision]
    expected = row / search.temperature(step) * (v - (row * v).sum())
    assert torch.allclose(got[decision].double(), expected, rtol=1e-4, atol=1e-6)  # the logits are float32


def test_expected_cost_is_the_mean_over_all_allocations() -> None:
    layers = LONE[:3]
    space = SearchSpace(layers, FORMATS)
    table = CostTable(layers, space.formats)
    config = DifferentiableConfig(temperature_start=3.0, temperature_end=3.0)
    search = DifferentiableSearch(SearchProblem(space, table, TARGET), config, 10)
    with torch.no_grad():
        search.policy.logits.copy_(torch.randn(search.policy.logits.shape))
    p = torch.softmax(search.policy.logits.detach() / 3.0, -1).double()
    mean = 0.0
    for choice in itertools.product(range(len(FORMATS)), repeat=3):
        probability = math.prod(float(p[row, k]) for row, k in enumerate(choice))
        mean += probability * table.of(space.allocation(torch.tensor(choice)))
    assert math.isclose(float(search.expected_cost(0).detach()), mean, rel_tol=1e-6)  # probabilities are float32


def test_the_cost_term_is_added_to_the_loss() -> None:
    """One update against Adam on the whole loss, for a loss that is linear in the probabilities."""
    space = SearchSpace(LONE, FORMATS)
    table = CostTable(LONE, space.formats)
    search = DifferentiableSearch(SearchProblem(space, table, TARGET), DifferentiableConfig(cost_weight=0.7), 10)
    v = torch.randn(len(space.decisions), len(FORMATS))
    logits = torch.zeros_like(v, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=search.config.architecture_learning_rate)
    for step in range(3):
        (search.probabilities(step) * v).sum().backward()
        search.update(step)
        p = torch.softmax(logits, -1)
        excess = (search.problem.expected_cost(p) / search.problem.target_cost - 1).abs()
        ((p * v).sum() + 0.7 * excess).backward()
        adam.step()
        adam.zero_grad()
        assert torch.allclose(search.policy.logits, logits, atol=1e-5)  # two graphs of the same sums


def test_gradients_are_averaged_over_ranks() -> None:
    space = SearchSpace(LONE, FORMATS)
    other = torch.randn(space.allowed.shape)
    seen: list[Tensor] = []

    def gather(values: Tensor) -> Tensor:
        seen.append(values.clone())
        return torch.cat([values, other.flatten()])

    config = DifferentiableConfig(cost_weight=0.0)
    search = DifferentiableSearch(
        SearchProblem(space, CostTable(LONE, space.formats), TARGET), config, 10, world_size=2, gather=gather
    )
    alone = DifferentiableSearch(SearchProblem(space, CostTable(LONE, space.formats), TARGET), config, 10)
    (search.probabilities(0) * torch.randn(other.shape)).sum().backward()
    alone.policy.logits.grad = (search.policy.logits.grad + other) / 2
    search.update(0)
    alone.update(0)
    assert torch.equal(search.policy.logits, alone.policy.logits)


def test_gumbel_noise_depends_on_seed_step_and_rank_and_anneals() -> None:
    space = SearchSpace(LONE, FORMATS)
    config = DifferentiableConfig(
        relaxation="gumbel", temperature_start=5.0, temperature_end=0.05, explore_fraction=1.0
    )

    def at(step: int, **arguments: Any) -> Tensor:
        table = CostTable(LONE, space.formats)
        return (
            DifferentiableSearch(SearchProblem(space, table, TARGET), config, 100, **arguments)
            .probabilities(step)
            .detach()
        )

    assert torch.equal(at(3, seed=1), at(3, seed=1))
    for other in (at(4, seed=1), at(3, seed=2), at(3, seed=1, rank=1)):
        assert not torch.equal(at(3, seed=1), other)
    assert at(99).amax(-1).mean() > 0.95 > 0.5 > at(0).amax(-1).mean()
    search = DifferentiableSearch(SearchProblem(space, CostTable(LONE, space.formats), TARGET), config, 100)
    assert [search.temperature(step) for step in (0, 50, 100)] == pytest.approx([5.0, 0.5, 0.05])


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def searched(
    accelerator: Accelerator, folder: Path | None = None, resume: bool = False, die_at: int = -1, **changes: Any
) -> Any:
    """(model, final choice, logits), of a search of 6 of 12 steps."""
    model, data = tiny("vit"), Blobs(80)
    layers = trace_layers(model)
    space = SearchSpace(layers, FORMATS)
    settings = TrainConfig(max_steps=12, batch_size=8, learning_rate=1e-3, save_steps=4, logging_steps=1, **changes)
    config = DifferentiableConfig("gumbel", 5.0, 0.5, explore_fraction=0.5)
    hooks = []

    def stop(entry: dict[str, Any]) -> None:
        if entry["step"] == die_at:
            raise InterruptedError

    def run(hook: Any) -> None:
        hooks.append(hook)
        train(model, data, settings, accelerator, hook=hook, state_folder=folder, resume=resume, on_log=stop)

    table = CostTable(layers, space.formats)
    final = differentiable_search(model, SearchProblem(space, table, TARGET), run, settings.max_steps, config, seed=1)
    return model, final, hooks[0].search.policy.logits.detach()


@pytest.mark.parametrize("micro", [1, 2])
def test_a_search_ends_at_the_target_in_ordinary_layers(accelerator: Accelerator, micro: int) -> None:
    model, final, logits = searched(accelerator, gradient_accumulation_steps=micro)
    assert 0.97 <= final.cost_ratio <= 1
    assert (logits != 0).any()
    switch = next(m for m in model.modules() if hasattr(m, "switch")).switch
    x = images(2)
    got = model.eval()(x).logits
    switch.set_allocation(final.allocation)
    assert torch.equal(got, model(x).logits)
    assert not any(hasattr(module, "mixture") for module in model.modules())


@pytest.mark.parametrize("die_at", [5, 11])  # while searching, and after
def test_an_interrupted_search_ends_in_the_same_bits(accelerator: Accelerator, tmp_path: Path, die_at: int) -> None:
    whole, final, logits = searched(accelerator)
    with pytest.raises(InterruptedError):
        searched(accelerator, tmp_path, die_at=die_at)
    again, final_again, logits_again = searched(accelerator, tmp_path, resume=True)
    assert final == final_again and torch.equal(logits, logits_again)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_state_of_another_space_is_refused() -> None:
    space = SearchSpace(LONE, FORMATS)
    search = DifferentiableSearch(
        SearchProblem(space, CostTable(LONE, space.formats), TARGET), DifferentiableConfig(), 10
    )
    with pytest.raises(CheckpointError, match="logits is missing"):
        search.load_state_dict({})
    with pytest.raises(CheckpointError, match="optimizer"):
        search.load_state_dict({"logits": torch.zeros(len(space.decisions), len(FORMATS))})
    with pytest.raises(CheckpointError, match=r"\[2, 2\]"):
        search.load_state_dict({"logits": torch.zeros(2, 2)})


@pytest.mark.parametrize(("arguments", "message"), [
    ({"relaxation": "hard"}, "relaxation='hard' does not exist; choose from softmax, gumbel"),
    ({"temperature_end": 0.0}, "temperature_end=0.0 must be a number above 0"),
    ({"temperature_start": math.inf}, "temperature_start=inf must be"),
    ({"architecture_learning_rate": -1}, "architecture_learning_rate=-1 must be a number above 0"),
    ({"cost_weight": -0.1}, "cost_weight=-0.1 must be a number at least 0"),
    ({"explore_fraction": 1.5}, "explore_fraction=1.5 must be a number above 0 and at most 1"),
    ({"explore_fraction": True}, "explore_fraction=True must be"),
])  # fmt: skip
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DifferentiableConfig(**arguments)


def test_what_it_cannot_search() -> None:
    separate = SearchSpace(LONE, FORMATS, activation="separate")
    table = CostTable(LONE, separate.formats)
    with pytest.raises(ConfigError, match="not 'separate'; use the one-shot search"):
        DifferentiableSearch(SearchProblem(separate, table, TARGET), DifferentiableConfig(), 10)
    with pytest.raises(TargetError, match="below the cheapest"):
        DifferentiableSearch(
            SearchProblem(SearchSpace(LONE, FORMATS), table, Target.of(target_bits=1)), DifferentiableConfig(), 10
        )


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward pass, each storage once, without the parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).logits.sum()
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def test_memory_grows_with_the_formats_where_that_of_the_one_shot_search_does_not() -> None:
    mixture_bytes, one_shot_bytes = [], []
    for formats in (
        ("int4", "int8"),
        ("int4", "int8", "e2m1", "e4m3"),
        ("int2", "int3", "int4", "int5", "int6", "int7"),
    ):
        model, space, switch, mixture = mixed("vit", formats)
        uniform = torch.full((len(space.decisions), len(formats)), 1 / len(formats), requires_grad=True)
        mixture.set(uniform)
        mixture_bytes.append(saved_bytes(model.train(), images(8)))
        mixture.remove()
        index = torch.ones(len(space.layers), dtype=torch.long)
        switch.set(index, index)
        one_shot_bytes.append(saved_bytes(model, images(8)))
    assert len(set(one_shot_bytes)) == 1
    two, four, six = mixture_bytes
    assert two > 1.3 * one_shot_bytes[0]
    assert math.isclose(six - four, four - two, rel_tol=0.02)  # linear in the formats; scalars of p come on top
    assert four - two > 0.8 * one_shot_bytes[0]
