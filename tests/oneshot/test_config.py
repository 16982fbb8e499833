"""Settings: what is refused, and that the paper's preset is the paper's."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fliqs_hf.errors import ConfigError
from fliqs_hf.oneshot import SearchConfig


def test_the_paper_preset_is_what_the_paper_describes() -> None:
    """FLIQS, section 3: a quarter of uniform sampling, accuracy with the absolute cost term, a moving baseline,
    exploration to the last step, the arg-max as the result."""
    paper = SearchConfig.preset("paper")
    assert (paper.prior, paper.warmup_fraction, paper.explore_fraction) == ("none", 0.25, 1.0)
    assert (paper.quality, paper.reward, paper.baseline, paper.derive) == ("accuracy", "absolute", "moving", "argmax")
    assert paper.beta < 0
    assert paper.cost_weight == 0
    assert paper.samples_per_step == 1


def test_changes_to_a_preset() -> None:
    assert SearchConfig.preset("default") == SearchConfig()
    assert SearchConfig.preset("paper", beta=-3.0).beta == -3.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prior", "hessian"), ("quality", "logits"), ("reward", "relative"), ("derive", "sample"),
        ("baseline", "none"), ("prior_strength", -1), ("prior_strength", math.inf), ("prior_strength", math.nan),
        ("prior_images", 0), ("prior_images", 10.5), ("prior_passes", 0), ("prior_passes", 3),
        ("warmup_fraction", -0.1), ("explore_fraction", 1.1), ("beta", 0.3), ("cost_weight", -1),
        ("samples_per_step", 0), ("samples_per_step", 1.5),
        ("samples_per_step", True), ("baseline_momentum", 1.5), ("policy_learning_rate", "0.1"),
        ("entropy_weight", None), ("band", 0.6),
    ],
)  # fmt: skip
def test_bad_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}=") as error:
        SearchConfig(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("preset", "changes", "named"),
    [
        ("default", {"prior_entropy": 0.3, "prior_strength": 50}, "prior_strength=50 takes the place of"),
        ("paper", {"prior_passes": 1}, "prior_passes=1 has no effect without a prior"),
        ("default", {"prior": "none", "prior_images": 64}, "prior_images=64 has no effect without a prior"),
        ("default", {"beta": -0.5}, "beta=-0.5 has no effect with reward='quality'"),
    ],
)
def test_changes_without_effect_are_refused(preset: str, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SearchConfig.preset(preset, **changes)


def test_a_warmup_longer_than_the_search() -> None:
    with pytest.raises(ConfigError, match=r"warmup_fraction=0\.7 must not exceed explore_fraction=0\.1"):
        SearchConfig(warmup_fraction=0.7)


def test_unknown_presets_and_settings() -> None:
    with pytest.raises(ConfigError, match="preset='papr' does not exist; choose from default, paper"):
        SearchConfig.preset("papr")
    with pytest.raises(ConfigError, match="'explore_fractoin'; did you mean 'explore_fraction'"):
        SearchConfig.preset("default", explore_fractoin=0.5)
    with pytest.raises(ConfigError, match="'zzz'; known are prior, prior_entropy"):
        SearchConfig.preset("default", zzz=0.5)
