"""The names of a comparison's methods: each means what it says, or is refused with what is wrong with it."""

from __future__ import annotations

import pytest

from fliqs_hf.errors import ConfigError
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.pipeline.compare_methods import METHODS as DEFAULTS
from fliqs_hf.pipeline.compare_methods import check_methods, runs, search_config, uniform_format
from tests.pipeline.test_compare import METHODS


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("paper-x2", "'paper-x2': 'x2' does not exist, as paper is FLIQS as published"),
        ("paper-0.2", "'paper-0.2': '0.2' does not exist"),
        ("search-0.2-0.3", "'search-0.2-0.3': '0.3' sets explore_fraction a second time"),
        ("search-x2-p1-x3", "'x3' sets samples_per_step a second time"),
        ("search-hh2", "'hh2' does not exist; search-… takes NUMBER .explore_fraction., xNUMBER .samples_per_step."),
        ("search-z2", "'z2' does not exist; search-… takes"),
        ("search-1_0", "'1_0' does not exist"),
        ("search-x1e1", "'x1e1' does not exist"),
        ("search-x٣", "does not exist"),
        ("search-nan", "'nan' does not exist"),
        ("search-", "'' does not exist"),
        ("search-x2.5", "'search-x2.5': samples_per_step=2.5 must be a whole number"),
        ("search-h0.3-k50", "prior_entropy=0.3 is what prior_strength=50.0 takes the place of"),
        ("uniform-int4_zp", "'uniform-int4_zp': int4_zp is for inputs only"),
        ("ptq-uniform-int4_zp", "int4_zp is for inputs only"),
    ],
)
def test_a_name_means_what_it_says_or_is_refused(method: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check_methods([method])


def test_every_part_of_the_name_of_a_search() -> None:
    changes = {"explore_fraction": 0.4, "samples_per_step": 2, "prior_entropy": 0.5, "policy_learning_rate": 0.02}
    assert search_config("search-.4-x2-h0.5-l0.02-p1") == SearchConfig(**changes, prior_passes=1)
    assert search_config("search-k50") == SearchConfig(prior_strength=50.0)
    assert search_config("search") == SearchConfig() and search_config("paper") == SearchConfig.preset("paper")


def test_the_runs_of_a_comparison() -> None:
    assert runs(["uniform-int4", "fisher"], [3, 2.5], [0, 1]) == [
        ("uniform-int4", 4.0, 0), ("fisher", 3, 0), ("uniform-int4", 4.0, 1), ("fisher", 3, 1), ("fisher", 2.5, 0),
        ("fisher", 2.5, 1),
    ]  # fmt: skip
    assert runs(["uniform-fp", "manual", "uniform-fp4"], [2.5], [0]) == [("uniform-e2m1", 4.0, 0)]
    assert runs(["uniform-e2m1", "uniform-fp4"], [3], [0]) == [("uniform-e2m1", 4.0, 0)]


@pytest.mark.parametrize("method", [*METHODS, *DEFAULTS, "ptq-uniform-int"])
def test_other_methods_follow_the_target(method: str) -> None:
    assert uniform_format(method) is None


@pytest.mark.parametrize(
    ("method", "meant"),
    [("uniform-e9m4", "uniform-e"), ("ptq-uniform-itn8", "ptq-uniform-int"), ("serach", "search"),
     ("fischer", "fisher"), ("ptq-hesian", "ptq-hessian")],
)  # fmt: skip
def test_the_nearest_method_is_named(method: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown method '{method}'; did you mean '{meant}"):
        check_methods([method])
