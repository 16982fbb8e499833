"""Several limits at once, against enumeration of every allocation; formats that layers must have."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import ViTImageProcessor

import fliqs_hf_cli
from fliqs_hf.cost import CostTable, Target
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.selection import CostLimit, SearchProblem, SearchSpace
from tests.helpers.models import tiny
from tests.helpers.networks import BLOCKS, LONE

FORMATS = ("int2", "e2m1", "int4", "e4m3", "int8")
SPACES = {
    "same": lambda: SearchSpace(LONE, FORMATS),
    "tied": lambda: SearchSpace(BLOCKS, FORMATS),
    "required": lambda: SearchSpace(LONE, FORMATS, require={"layer3": ["int8", "e4m3"]}, min_bits={"layer0": 4}),
    "separate": lambda: SearchSpace(LONE[:3], FORMATS, "separate"),
    "separate, tied": lambda: SearchSpace(BLOCKS, FORMATS, "separate", ["block"]),
}
KINDS = ("bops", "weight_bytes", "energy_uj")
TARGETS = {"bops": "bops", "weight_bytes": "size_mb", "energy_uj": "energy_uj"}


def every_choice(space: SearchSpace) -> Tensor:
    allowed = [row.nonzero().flatten().tolist() for row in space.allowed]
    return torch.tensor(list(itertools.product(*allowed)))


def problem(space: SearchSpace, values: dict[str, float]) -> SearchProblem:
    """With limits, values by kind of cost in its unit."""
    limits = []
    for kind, value in values.items():
        table = CostTable(space.layers, space.formats, kind)
        limits.append(CostLimit(table, Target(TARGETS[kind], value / (1e6 if kind == "weight_bytes" else 1), True)))
    first, *others = limits
    return SearchProblem(space, first.costs, first.target, tuple(others))


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("seed", range(3))
def test_no_allocation_is_better_within_all_limits(name: str, seed: int) -> None:
    space, generator = SPACES[name](), torch.Generator().manual_seed(seed)
    choices = every_choice(space)
    tables = {kind: CostTable(space.layers, space.formats, kind) for kind in KINDS}
    costs = {kind: table.cost(*space.indices(choices)) for kind, table in tables.items()}
    scores = torch.randn(len(space.decisions), len(FORMATS), generator=generator)
    total = scores.double()[torch.arange(len(space.decisions)), choices].sum(-1)
    solved = 0
    for quantiles in itertools.product((0.1, 0.4, 0.8), repeat=3):
        high = {kind: costs[kind].quantile(q).item() for kind, q in zip(KINDS, quantiles, strict=True)}
        # A size is given in megabytes: what is left of it when it is a number of bytes again.
        inside = torch.stack([costs[kind] <= high[kind] * (1 + 1e-12) for kind in KINDS]).all(0)
        asked = problem(space, {kind: value * (1 + 1e-12) for kind, value in high.items()})
        if not inside.any():
            with pytest.raises(TargetError, match="together"):
                _ = asked.target_cost
            continue
        solved += 1
        found = asked.choice_at_target(scores)
        reached = scores.double()[torch.arange(len(space.decisions)), found].sum().item()
        assert reached == pytest.approx(total[inside].max().item(), abs=1e-7)  # the solver's gap
        assert asked.keeps_limits(found) and all(share <= 1 for share in asked.used(found).values())
        assert bool(space.allowed[torch.arange(len(space.decisions)), found].all())
    assert solved > 5


@pytest.mark.parametrize("seed", range(4))
def test_limits_out_of_reach_are_refused_with_the_nearest_values(seed: int) -> None:
    """Each of the values that the message names is the least: it can be had, and nothing below it."""
    generator = torch.Generator().manual_seed(seed)
    space = SearchSpace(LONE, FORMATS, "separate") if seed % 2 else SearchSpace(LONE, FORMATS)
    choices = every_choice(space) if not seed % 2 else None
    low = {}
    for kind in KINDS[:2]:
        table = CostTable(space.layers, space.formats, kind)
        cheapest = SearchProblem(space, table).reachable[0]
        low[kind] = cheapest * (1.0 + 0.3 * torch.rand(1, generator=generator).item())
    require = {"layer1": ["int8"], "layer4": ["int8", "e4m3"]}
    space = SearchSpace(LONE, FORMATS, space.activation, require=require)
    asked = problem(space, low)
    with pytest.raises(TargetError) as error:
        _ = asked.target_cost
    text = str(error.value)
    if "together" not in text:
        assert "below the cheapest" in text  # of one alone
        return
    assert choices is not None or space.activation == "separate"
    found = dict(re.findall(r"target_(bops|size_mb) can be had from ([\d.,]+) on", text))
    for kind, value in ((k, float(v.replace(",", ""))) for k, v in found.items()):
        cost = {"bops": "bops", "size_mb": "weight_bytes"}[kind]
        unit = 1e6 if kind == "size_mb" else 1
        assert problem(space, low | {cost: value * unit}).target_cost > 0
        with pytest.raises(TargetError, match="together"):
            _ = problem(space, low | {cost: value * unit * (1 - 2e-5)}).target_cost


def test_which_limit_binds_is_said() -> None:
    """One layer in 8 bits takes 64 × 101 operations, of which 98 % are asked for, and more bytes than it may have."""
    space = SearchSpace(LONE[:1], ("int2", "int8"))
    table = CostTable(space.layers, space.formats)
    size = CostTable(space.layers, space.formats, "weight_bytes")
    least = 4 * 101
    asked = SearchProblem(space, table, Target("bops", 64 * 101), (CostLimit(size, Target("size_mb", 16e-6, True)),))
    with pytest.raises(TargetError) as error:
        _ = asked.target_cost
    assert "target_bops=6464 and target_size_mb=0.000016" in str(error.value)
    assert "target_size_mb can be had from 0.000021000 on" in str(error.value)
    assert f"target_bops can be had from {least} on" in str(error.value)


def test_one_limit_alone_out_of_reach() -> None:
    with pytest.raises(TargetError, match=r"target_size_mb=0\.000001000 is below the cheapest"):
        _ = problem(SearchSpace(LONE, FORMATS), {"bops": 1e5, "weight_bytes": 1}).target_cost
    with pytest.raises(ConfigError, match="needs a cost table"):
        CostLimit(CostTable(LONE, FORMATS), Target("size_mb", 1.0))


def test_a_limit_that_does_not_bind_changes_nothing() -> None:
    space = SearchSpace(LONE, FORMATS)
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    table = CostTable(LONE, FORMATS)
    alone = SearchProblem(space, table, Target("bops", 3e4, cap=True))
    loose = CostLimit(CostTable(LONE, FORMATS, "weight_bytes"), Target("size_mb", 1.0, True))
    both = SearchProblem(space, table, alone.target, (loose,))
    free = alone.best_choice(scores, low=-math.inf, high=3e4)
    assert both.choice_at_target(scores).tolist() == free.tolist()


def test_a_search_keeps_the_limits_beside_its_target() -> None:
    space = SearchSpace(LONE, FORMATS)
    table, target = CostTable(LONE, FORMATS), Target("bits", 4)
    size = CostTable(LONE, FORMATS, "weight_bytes")
    alone = SearchProblem(space, table, target)
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    most = float(size.cost(*space.indices(alone.choice_at_target(scores)))) - 1
    tight = SearchProblem(space, table, target, (CostLimit(size, Target("size_mb", most / 1e6, True)),))
    for derive in ("argmax", "program"):
        search = OneShotSearch(tight, SearchConfig(derive=derive), 10)  # type: ignore[arg-type]
        found = space.choice(search.finalize().allocation)
        assert tight.keeps_limits(found) and target.is_met(float(tight.cost(found)), tight.target_cost)


@pytest.mark.parametrize(("rules", "message"), [
    ({"require": {"layer9": ["int8"]}}, "require: 'layer9' matches none"),
    ({"require": {"*": ["int5"]}}, "require: '\\*' has int5, which is not in the search space: add it there"),
    ({"min_bits": {"*": 9}}, "min_bits leaves 'layer0' without a format"),
    ({"min_bits": {"*": "many"}}, "no number of bits"), ({"min_bits": 4}, "each with a number"),
    ({"require": {"layer0": ["int8"]}, "min_bits": {"layer0": 9}}, "require and min_bits leaves 'layer0'"),
])  # fmt: skip
def test_rules_that_cannot_be(rules: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchSpace(LONE, FORMATS, **rules)  # type: ignore[arg-type]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "fp32")
    command = ["quantize", str(tmp_path / "fp32"), str(tmp_path / "run"), "--calibration", "digits", "--json",
               "--calibration_images", "16", "--match_labels", "index", "--label_column", "none",
               "--search_space", "int2", "int4", "int8"]  # fmt: skip
    limits = [
        "--target_size_mb",
        "0.021",
        "--target_bits",
        "5",
        "--min_bits",
        "*patch*=4",
        "--require",
        "classifier=int8",
    ]
    assert fliqs_hf_cli.main([*command, *limits]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])  # libraries that are imported first print too
    assert found["target"] == {"bits": 5, "size_mb": 0.021}
    assert found["checkpoint_bytes"] <= 21_000 and found["cost"]["target_ratio"] <= 1
    assert found["allocation"]["classifier"] == {"weight": "int8", "activation": "int8"}
    formats = {name: entry["weight"] for name, entry in found["allocation"].items()}
    assert all(fmt != "int2" for name, fmt in formats.items() if "patch" in name)
    for more, message in {
        ("--target_size_mb", "0.002", "--target_bits", "5"): "is below the cheapest",
        ("--target_bits", "5", "--target", "bits=4"): "target_bits is given more than once",
        ("--require", "classifier=int8"): "give a target",
        ("--target_bits", "5", "--min_bits", "classifier"): "give PATTERN=VALUE",
    }.items():
        assert fliqs_hf_cli.main([*command, "--overwrite", *more]) == 2
        assert message in capsys.readouterr().err
