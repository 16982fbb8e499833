"""Decisions, ties and what they cost, against enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

from fliqs_hf import Allocation
from fliqs_hf.cost import CostTable, trace_layers
from fliqs_hf.errors import ConfigError, FormatError
from fliqs_hf.selection import SearchProblem, SearchSpace
from tests.helpers.models import tiny
from tests.helpers.networks import BLOCKS, LONE

NAMES = [layer.name for layer in BLOCKS]


def groups(decisions: torch.Tensor) -> set[frozenset[str]]:
    """Sets of layers that share a decision."""
    return {
        frozenset(n for n, d in zip(NAMES, decisions.tolist(), strict=True) if d == one) for one in decisions.tolist()
    }


QKV = [{f"blocks.{b}.{n}" for n in "qkv"} for b in range(2)]
MLP = [{f"blocks.{b}.mlp"} for b in range(2)]


def test_one_format_per_input_ties_the_layers_that_read_it() -> None:
    space = SearchSpace(BLOCKS, "mixed")
    assert torch.equal(space.weight_decision, space.activation_decision)
    assert groups(space.weight_decision) == set(map(frozenset, [*QKV, *MLP]))
    assert [d.name for d in space.decisions] == [
        "blocks.0.{q,k,v}",
        "blocks.0.mlp",
        "blocks.1.{q,k,v}",
        "blocks.1.mlp",
    ]
    assert {d.kind for d in space.decisions} == {"both"}


def test_separate_formats_tie_only_the_inputs() -> None:
    space = SearchSpace(BLOCKS, "mixed", "separate")
    assert groups(space.weight_decision) == {frozenset([name]) for name in NAMES}
    assert groups(space.activation_decision) == set(map(frozenset, [*QKV, *MLP]))
    assert not set(space.weight_decision.tolist()) & set(space.activation_decision.tolist())
    kinds = [d.kind for d in space.decisions]
    assert kinds == ["weight"] * 8 + ["activation"] * 4
    assert len({d.name for d in space.decisions}) == 12  # they are keys of sensitivity.json and policy.jsonl


@pytest.mark.parametrize(
    ("tie", "expected"),
    [
        (["qkv"], [*QKV, *MLP]),
        (["block"], [QKV[0] | MLP[0], QKV[1] | MLP[1]]),
        (["model"], [set(NAMES)]),
        (["*.mlp"], [*QKV, MLP[0] | MLP[1]]),
        (["re:mlp$", "re:[.][qkv]$"], [QKV[0] | QKV[1], MLP[0] | MLP[1]]),
        (["*.mlp", "blocks.0"], [QKV[0] | MLP[0] | MLP[1], QKV[1]]),  # ties that overlap are joined
    ],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["same", "separate"])
def test_ties(tie: list[str], expected: list[set[str]], activation: str) -> None:
    space = SearchSpace(BLOCKS, "mixed", activation, tie)  # type: ignore[arg-type]
    assert groups(space.activation_decision) == set(map(frozenset, expected))
    if activation == "same":
        assert torch.equal(space.weight_decision, space.activation_decision)
    elif tie != ["*.mlp"] and "blocks.0" not in tie:  # there, weights that no pattern matches stay on their own
        assert groups(space.weight_decision) == set(map(frozenset, [*QKV, *MLP] if tie == ["qkv"] else expected))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("swin", {"layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"}),
        ("resnet", {"stages.0.layers.0", "stages.1.layers.0"}),
        ("vit", {"vit.layers.0", "vit.layers.1"}),
    ],
)
def test_blocks_of_models(architecture: str, expected: set[str]) -> None:
    """Stages of hierarchical models are numbered too, and so are the convolutions of a ResNet's block."""
    space = SearchSpace(trace_layers(tiny(architecture)), ["int4", "int8"], tie=["block"])
    tied = [decision.layers for decision in space.decisions if len(decision.layers) > 1]
    assert len(tied) == len(expected)
    for block in expected:
        (layers,) = [layers for layers in tied if f"{block}." in layers[0]]
        assert all(block in name for name in layers)
        assert set(layers) == {layer.name for layer in space.layers if f"{block}." in layer.name}


def test_a_choice_travels_to_an_allocation_and_back() -> None:
    space = SearchSpace(BLOCKS, "int2,e2m1,int8", "separate", ["block"])
    for choice in itertools.product(range(3), repeat=4):
        choice = torch.tensor(choice)
        allocation = space.allocation(choice)
        assert torch.equal(space.choice(allocation), choice)
        weight, activation = space.indices(choice)
        for row, name in enumerate(NAMES):
            assert allocation[name].weight == space.formats[weight[row]]
            assert allocation[name].activation == space.formats[activation[row]]


def test_cost_of_a_batch_of_choices_is_the_cost_of_each_allocation() -> None:
    space = SearchSpace(BLOCKS, "mixed", "separate")
    table = CostTable(BLOCKS, space.formats, fixed_cost=5)
    problem = SearchProblem(space, table)
    choices = torch.randint(
        len(space.formats), (2, 3, len(space.decisions)), generator=torch.Generator().manual_seed(0)
    )
    expected = [[table.of(space.allocation(choice)) for choice in row] for row in choices]
    assert problem.cost(choices).tolist() == expected


@pytest.mark.parametrize("activation", ["same", "separate"])
@pytest.mark.parametrize("kind", ["bops", "weight_bytes"])
def test_expected_cost_equals_the_sum_over_all_allocations(activation: str, kind: str) -> None:
    layers = BLOCKS[:4]
    space = SearchSpace(layers, "int2,e2m1,bf16", activation)  # type: ignore[arg-type]
    table = CostTable(layers, space.formats, kind, fixed_cost=11)  # type: ignore[arg-type]
    problem = SearchProblem(space, table)
    p = torch.rand(len(space.decisions), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    every = torch.tensor(list(itertools.product(range(3), repeat=len(space.decisions))))
    weights = p[torch.arange(len(space.decisions)), every].prod(-1)
    # float64 sums in different orders
    assert problem.expected_cost(p).item() == pytest.approx((weights * problem.cost(every)).sum().item(), rel=1e-12)


def test_excluded_formats() -> None:
    space = SearchSpace(BLOCKS, "int2,int4,int8", exclude={"blocks.0.q": ["int2"], "*.mlp": ["int8"]})
    assert space.allowed.tolist() == [
        [False, True, True],
        [True, True, False],
        [True, True, True],
        [True, True, False],
    ]
    with pytest.raises(ConfigError, match=r"blocks\.0\.q.*not in the search space"):
        space.choice(Allocation.uniform(NAMES, "int2"))
    written = space.to_dict()["decisions"]
    assert [entry.get("excluded") for entry in written] == [["int2"], ["int8"], None, ["int8"]]
    assert all(entry["choices"] == ["int2", "int4", "int8"] for entry in written)


def test_excluded_formats_hold_for_both_roles() -> None:
    space = SearchSpace(LONE, "int2,int4", "separate", exclude={"layer2": ["int2"]})
    for decision, allowed in zip(space.decisions, space.allowed.tolist(), strict=True):
        assert allowed == [decision.layers != ("layer2",), True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "both"}, "activation='both'.*'same' or 'separate'"),
        ({"tie": ["nothing*"]}, r"tie: 'nothing\*' matches none of the 8 layers, such as 'blocks.0.q'"),
        ({"tie": ["re:("]}, "not a regular expression"),
        ({"exclude": {"nothing": ["int2"]}}, "exclude: 'nothing' matches none"),
        ({"exclude": {"*": ["int3"]}}, "has int3, which is not in the search space"),
        ({"exclude": {"*.q": ["int2"], "*.k": ["int4"]}}, r"leaves 'blocks\.0\.\{q,k,v\}' without a format"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchSpace(BLOCKS, "int2,int4", **arguments)  # type: ignore[arg-type]


def test_no_layers_and_bad_formats() -> None:
    with pytest.raises(ConfigError, match="at least one layer"):
        SearchSpace((), "mixed")
    with pytest.raises(ConfigError, match=r"a space for inputs only leaves .*:weight' without a format"):
        SearchSpace(BLOCKS, ["int4_zp"], "separate")
    with pytest.raises(FormatError, match="fliqs-m-int"):
        SearchSpace(BLOCKS, "fliqs-m-int")


def test_allocations_outside_the_space() -> None:
    space = SearchSpace(BLOCKS, "int2,int4")
    uniform = Allocation.uniform(NAMES, "int4")
    with pytest.raises(ConfigError, match=r"blocks\.0\.q: W int8 / A int8 is not in the search space"):
        space.choice(Allocation.uniform(NAMES, "int8"))
    with pytest.raises(ConfigError, match=r"blocks\.0\.k: W int2"):  # tied to blocks.0.q, but different
        space.choice(Allocation({**uniform, "blocks.0.k": Allocation.uniform(["k"], "int2")["k"]}))
    with pytest.raises(ConfigError, match=r"blocks\.1\.mlp: fp32"):
        space.choice(Allocation({name: uniform[name] for name in NAMES[:-1]}))


@pytest.mark.parametrize("architecture", ["vit", "deit-distilled", "beit", "dinov2", "swin", "siglip", "clip"])
def test_query_key_and_value_of_real_models_share_a_decision(architecture: str) -> None:
    space = SearchSpace(trace_layers(tiny(architecture)), "mixed")
    ends = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "query": "q", "key": "k", "value": "v"}
    for decision in space.decisions:
        found = [ends[name.rsplit(".", 1)[-1]] for name in decision.layers if name.rsplit(".", 1)[-1] in ends]
        if found:
            assert sorted(found) == ["k", "q", "v"]
