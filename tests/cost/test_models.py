"""Costs of allocations: the paper's figures, the table against the plain functions, targets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import transformers as hf

from fliqs_hf import Allocation, LayerFormats
from fliqs_hf.cost import CostTable, LayerInfo, Target, bops, example_image, trace_layers, weight_bytes
from fliqs_hf.errors import AllocationError, ConfigError, FormatError, TargetError
from fliqs_hf.formats import parse

LAYERS = (
    LayerInfo("patch", "conv2d", 1000, 27, 3, 0),
    LayerInfo("q", "linear", 200, 16, 4, 1),
    LayerInfo("head", "linear", 77, 33, 11, 2),
)
NAMES = tuple(layer.name for layer in LAYERS)
FORMATS = ("int2", "e2m1", "int5", "e4m3", "bf16")


def traced(cls: Any, config: Any) -> tuple[LayerInfo, ...]:
    with torch.device("meta"):
        model = cls(config)
    return trace_layers(model, example_image(model, 224))


def uniform_gbops(layers: tuple[LayerInfo, ...], fmt: str) -> float:
    return bops(layers, Allocation.uniform([layer.name for layer in layers], fmt)) / 1e9


DEIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
RESNET_18 = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
EFFICIENTNET_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}

#: Model, GBOPs at 4 bits (FLIQS, Dotzel et al. 2024, accuracy tables). ImageNet: 1000 labels, 224 × 224.
PAPER = {
    "DeiT-S/16": (hf.ViTForImageClassification, hf.ViTConfig(**DEIT_S, num_labels=1000), 67.96),
    "DeiT-S/16 distilled": (hf.DeiTForImageClassification, hf.DeiTConfig(**DEIT_S, num_labels=1000), 67.96),
    "ResNet-18": (hf.ResNetForImageClassification, hf.ResNetConfig(**RESNET_18, num_labels=1000), 29.23),
    "ResNet-50": (hf.ResNetForImageClassification, hf.ResNetConfig(num_labels=1000), 65.4),
    "MobileNetV2": (hf.MobileNetV2ForImageClassification, hf.MobileNetV2Config(num_labels=1000), 4.81),
    "EfficientNet-B0": (
        hf.EfficientNetForImageClassification,
        hf.EfficientNetConfig(**EFFICIENTNET_B0, num_labels=1000),
        6.16,
    ),
}


@pytest.mark.parametrize("model", PAPER)
def test_figures_of_the_paper(model: str) -> None:
    cls, config, gbops = PAPER[model]
    layers = traced(cls, config)
    # 1 %: the paper's own models differ from those of Transformers in details such as the one tested below.
    assert uniform_gbops(layers, "e2m1") == pytest.approx(gbops, rel=0.01)
    assert uniform_gbops(layers, "bf16") == 16 * uniform_gbops(layers, "int4")


def test_what_the_papers_resnet_18_has_and_ours_has_not() -> None:
    """The 0.7 % between them is a projection shortcut (1 × 1, 64 to 64 channels, 56 × 56) in the first stage."""
    cls, config, gbops = PAPER["ResNet-18"]
    shortcut = LayerInfo("shortcut", "conv2d", 56 * 56 * 64 * 64, 64 * 64, 64, 99)
    assert round(uniform_gbops((*traced(cls, config), shortcut), "e2m1"), 2) == gbops


def test_bops_by_hand() -> None:
    allocation = Allocation({"patch": LayerFormats.of("int8", "e2m1"), "q": LayerFormats.of("int3", None)})
    assert bops(LAYERS, allocation) == 1000 * 8 * 4 + 200 * 3 * 32 + 77 * 32 * 32
    assert bops(LAYERS, {}) == 1277 * 1024


def test_weight_bytes_by_hand() -> None:
    allocation = Allocation({"patch": LayerFormats.of("int3", "int8"), "q": LayerFormats.of("bf16", None)})
    # 27 codes of 3 bits: planes of ceil(27·2/8) and ceil(27/8) bytes, 3 scales; 16 BF16 without scales; 33 fp32
    assert weight_bytes(LAYERS, allocation) == (7 + 4 + 3 * 4) + 16 * 2 + 33 * 4
    assert weight_bytes(LAYERS, allocation, other_bytes=1000) == weight_bytes(LAYERS, allocation) + 1000


@pytest.mark.parametrize("kind", ["bops", "weight_bytes"])
def test_the_table_equals_the_plain_function(kind: Any) -> None:
    layers = traced(*PAPER["DeiT-S/16"][:2])
    names = [layer.name for layer in layers]
    table = CostTable(layers, FORMATS, kind, fixed_cost=123.0)
    plain = {"bops": bops, "weight_bytes": weight_bytes}[kind]
    generator = torch.Generator().manual_seed(0)
    weights, activations = torch.randint(len(FORMATS), (2, 4, 3, len(layers)), generator=generator)
    costs = table.cost(weights, activations)
    assert costs.shape == (4, 3) and costs.dtype == torch.float64
    for i, j in itertools.product(range(4), range(3)):
        allocation = Allocation(
            {
                name: LayerFormats.of(FORMATS[w], FORMATS[a])
                for name, w, a in zip(names, weights[i, j].tolist(), activations[i, j].tolist(), strict=True)
            }
        )
        # Exact: whole numbers below 2**53.
        assert costs[i, j].item() == plain(layers, allocation) + 123 == table.of(allocation)
    assert table.cost(weights[0, 0], activations[0, 0]).shape == ()
    assert table.table.shape == (len(layers), 5, 5) and table.table.dtype == torch.float64
    assert table.uniform("int7") == plain(layers, Allocation.uniform(names, "int7")) + 123
    assert table.fp32 == plain(layers, {}) + 123


@pytest.mark.parametrize("kind", ["bops", "weight_bytes"])
def test_the_reachable_range_is_that_of_all_allocations(kind: Any) -> None:
    formats = ("int3", "e2m1", "bf16")
    table = CostTable(LAYERS, formats, kind, fixed_cost=5)
    choices = [LayerFormats.of(w, a) for w in formats for a in formats]
    costs = [
        table.of(Allocation(dict(zip(NAMES, chosen, strict=True))))
        for chosen in itertools.product(choices, repeat=len(LAYERS))
    ]
    assert table.reachable == (min(costs), max(costs))


def test_uniform_bits() -> None:
    table = CostTable(LAYERS, FORMATS)
    assert table.uniform_bits(4) == table.uniform("int4") == 1277 * 16
    assert table.uniform_bits(2.5) == 1277 * 6.25
    size = CostTable(LAYERS, FORMATS, "weight_bytes")
    assert size.uniform_bits(16) == size.uniform("bf16") == (27 + 16 + 33) * 2  # without scales
    assert size.uniform_bits(2) == size.uniform("int2")
    assert size.uniform_bits(2.5) == (27 + 16 + 33) * 2.5 / 8 + (3 + 4 + 11) * 4
    both = CostTable(LAYERS, ("int16", "bf16"), "weight_bytes")  # of 16 bits each, with scales and without
    assert both.uniform_bits(16) == both.uniform("bf16") < both.uniform("int16")


def test_errors_of_costs() -> None:
    with pytest.raises(AllocationError, match="'nose'"):
        bops(LAYERS, Allocation.uniform(["nose"], "int4"))
    with pytest.raises(AllocationError, match="'nose'"):
        CostTable(LAYERS, FORMATS).of(Allocation.uniform(["nose"], "int4"))
    with pytest.raises(ConfigError, match="'q' is listed more than once"):
        CostTable((*LAYERS, LAYERS[1]), FORMATS)
    with pytest.raises(ConfigError, match="unknown kind of cost 'watts'"):
        CostTable(LAYERS, FORMATS, "watts")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one layer"):
        CostTable((), FORMATS)
    with pytest.raises(ConfigError, match="fixed_cost=-1"):
        CostTable(LAYERS, FORMATS, fixed_cost=-1)
    with pytest.raises(FormatError, match="each once"):
        CostTable(LAYERS, ("int4", "fp4", "e2m1"))
    with pytest.raises(FormatError, match="each once"):
        CostTable(LAYERS, ())
    index = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"\[2, 2\]"):
        CostTable(LAYERS, FORMATS).cost(index[:, :2], index[:, :2])
    with pytest.raises(ConfigError, match=r"\[3\]"):
        CostTable(LAYERS, FORMATS).cost(index, index[0])
    with pytest.raises(IndexError):
        CostTable(LAYERS, FORMATS).cost(index + len(FORMATS), index)


def test_formats_given_as_values_or_names_make_one_table() -> None:
    by_value = CostTable(LAYERS, [parse(fmt) for fmt in FORMATS])
    assert torch.equal(by_value.table, CostTable(LAYERS, FORMATS).table)


def test_targets_in_every_unit() -> None:
    table, size = CostTable(LAYERS, FORMATS), CostTable(LAYERS, FORMATS, "weight_bytes", fixed_cost=50)
    assert Target.of(target_bits=4).resolve(table) == 1277 * 16
    assert Target.of(target_bits=2.5).resolve(table) == 1277 * 6.25
    assert Target.of(target_bops=30000).resolve(table) == 30000
    assert Target.of(target_ratio=1 / 64).resolve(table) == 1277 * 16
    assert Target.of(target_size_mb=160e-6).resolve(size) == pytest.approx(160, rel=1e-15)  # 160e-6 is no exact float
    assert Target.of(target_size_mb=1).cost_kind == "weight_bytes"
    assert {Target.of(**{f"target_{kind}": 1}).cost_kind for kind in ("bits", "bops", "ratio")} == {"bops"}


def test_both_ends_of_the_range_can_be_targets() -> None:
    below = above = 0
    for fixed_cost in range(200):
        table = CostTable(LAYERS, ["int3", "e4m3"], fixed_cost=fixed_cost)
        low, high = table.reachable
        assert Target.of(target_bits=3).resolve(table) == Target.of(target_bops=low).resolve(table) == low
        assert Target.of(target_bits=8).resolve(table) == Target.of(target_bops=high).resolve(table) == high
        # Not every ratio multiplies out to where it came from, but none may land outside the range.
        low_ratio, high_ratio = low / table.fp32, high / table.fp32
        below += low_ratio * table.fp32 < low
        above += high_ratio * table.fp32 > high
        assert low <= Target.of(target_ratio=low_ratio).resolve(table) <= low * (1 + 1e-9)
        assert high * (1 - 1e-9) <= Target.of(target_ratio=high_ratio).resolve(table) <= high
    assert below and above


def test_both_ends_of_the_range_of_a_large_model_can_be_ratios() -> None:
    """The product of a ratio and 10¹² operations is off by more than a small constant."""
    for fixed_cost in range(10**14, 10**14 + 200):
        table = CostTable([LayerInfo("a", "linear", 10**12, 16, 4, 0)], ["int3", "e4m3"], fixed_cost=fixed_cost)
        for end in table.reachable:
            assert Target.of(target_ratio=end / table.fp32).resolve(table) == pytest.approx(end, rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"target_bits": 3.9}, "bops", "target_bits=3.9 is below the cheapest.*from 4 to 8;.*fewer bits"),
        ({"target_bits": 8.1}, "bops", "target_bits=8.1 is above the dearest.*from 4 to 8;.*more bits"),
        ({"target_bops": 20431}, "bops", "below the cheapest.*from 20432 to 81728"),
        ({"target_ratio": 0.5}, "bops", "above the dearest.*from 0.015625 to 0.0625"),
        ({"target_size_mb": 1e-6}, "weight_bytes", "below the cheapest.*from 0.000111 to 0.000148"),
    ],
)
@pytest.mark.parametrize("cap", [False, True])
def test_targets_out_of_reach(arguments: dict[str, float], kind: Any, message: str, cap: bool) -> None:
    table = CostTable(LAYERS, ("int4", "int8"), kind)
    with pytest.raises(TargetError, match=message):
        Target.of(**arguments, cap=cap).resolve(table)


def test_the_range_of_a_narrower_search_space_counts() -> None:
    table = CostTable(LAYERS, ("int4", "int8"))
    low, high = table.reachable
    assert Target.of(target_bits=4).resolve(table, (low, high)) == low
    with pytest.raises(TargetError, match="below the cheapest"):
        Target.of(target_bits=4).resolve(table, (low + 100, high))


def test_targets_of_the_wrong_kind_of_table() -> None:
    with pytest.raises(ConfigError, match="target in size_mb needs a cost table of weight_bytes, not of bops"):
        Target.of(target_size_mb=1).resolve(CostTable(LAYERS, FORMATS))
    with pytest.raises(ConfigError, match="needs a cost table of bops"):
        Target.of(target_bits=4).resolve(CostTable(LAYERS, FORMATS, "weight_bytes"))


def test_two_sided_targets_and_caps() -> None:
    two_sided, cap = Target.of(target_bops=100), Target.of(target_bops=100, cap=True)
    assert [two_sided.is_met(cost, 100) for cost in (97.9, 98.5, 100, 101.5, 102.1)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert [cap.is_met(cost, 100) for cost in (1, 100, 100.001)] == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of target_bits.*not none"),
        ({"target_bits": 4, "target_ratio": 0.1}, "not target_bits=4 and target_ratio=0.1"),
        ({"target_bits": 0}, "target_bits=0 must be a positive number, at most 32"),
        ({"target_bits": 33}, "at most 32"),
        ({"target_bits": True}, "target_bits=True must be a number"),
        ({"target_bits": "4"}, "target_bits='4' must be a number"),
        ({"target_bops": float("nan")}, "target_bops=nan must be a positive number"),
        ({"target_bops": float("inf")}, "target_bops=inf must be a positive number"),
        ({"target_size_mb": -1}, "target_size_mb=-1"),
        ({"target_ratio": 1.01}, "at most 1"),
    ],
)
def test_bad_targets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target.of(**arguments)


def test_unknown_kind_of_target() -> None:
    with pytest.raises(TargetError, match="unknown kind of target 'watts'"):
        Target("watts", 1.0)  # type: ignore[arg-type]
