"""`SearchConfig`: every choice of the search with its reason, and the presets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from fliqs_hf.checks import is_number, is_whole
from fliqs_hf.errors import ConfigError, did_you_mean
from fliqs_hf.selection import Sensitivity, TwoPass, find_score, scores

Quality = Literal["loss", "accuracy"]
Reward = Literal["quality", "absolute", "capped"]
Baseline = Literal["leave_one_out", "moving"]
Derivation = Literal["program", "argmax"]


@dataclass(frozen=True)
class SearchConfig:
    """How formats are sampled, how the policy learns, and how the final allocation is derived.

    The defaults are the `default` preset; `SearchConfig.preset("paper")` is FLIQS as published.

    Raises: ConfigError: a value out of range, which it names.
    """

    #: Where the policy starts: logits = −κ·score, the score of each format by a registered score (`fisher`: from one
    #: backward pass) of `prior_images`. From scratch (`none`) a policy hardly commits within 10³ steps.
    prior: str = "fisher"
    #: Mean entropy per decision, in nats, that the policy starts with: κ is chosen for it. A fixed κ does not carry
    #: over between models and scores: 50, found for loss deltas, leaves Fisher scores nearly uniform, and samples that
    #: bad teach the weights the wrong thing.
    prior_entropy: float = 0.3
    #: A fixed κ instead, per unit of loss.
    prior_strength: float | None = None
    #: 512 images lost 1.7 points at 2.5 bits against 1500.
    prior_images: int = 1536
    #: 2: the scores are measured once more in the model as quantized by the allocation that the first ones give, and
    #: the geometric mean of both counts (see `TwoPass`). 1: those of the fp32 model alone, in half the time.
    prior_passes: int = 2
    #: Steps that sample formats uniformly and train weights only, as a fraction. The prior makes it unnecessary.
    warmup_fraction: float = 0.0
    #: Step at which the allocation is frozen, as a fraction of the run; the rest trains the weights for it. 0 takes
    #: the allocation straight from the prior. With a prior exploring longer costs accuracy in short runs and has not
    #: paid clearly in long ones (docs/search.md); without one (`prior="none"`) the policy needs far more.
    explore_fraction: float = 0.1
    #: What a sample is rewarded for: −loss on the training batch is far less noisy than accuracy on it.
    quality: Quality = "loss"
    #: `quality` rewards Q alone and leaves cost to `cost_weight` and the derivation; `absolute` is the paper's
    #: Q + β·|C/C_target − 1|; `capped` penalises only excess. Both penalise the excess over every further limit.
    reward: Reward = "quality"
    #: β of the paper's reward, negative.
    beta: float = -0.3
    #: Weight of (E[C]/C_target − 1)², whose gradient is exact: the paper's cost term on samples is 6 to 12 times as
    #: noisy as the quality signal. Every further limit adds the square of what the expected cost exceeds it by.
    cost_weight: float = 1.0
    #: Allocations per step and rank on the same batch: the first trains the weights, each further one adds a forward
    #: pass that is only compared with it.
    samples_per_step: int = 1
    #: What a reward is compared with. `leave_one_out`: the mean of the other allocations on the same batch, or, with
    #: one per rank, of the other ranks in the same step; with a single allocation per step there are no others, and
    #: it is `moving`: an exponential moving average over the steps, as in the paper.
    baseline: Baseline = "leave_one_out"
    #: Momentum of that moving average.
    baseline_momentum: float = 0.9
    #: Adam on the logits.
    policy_learning_rate: float = 0.01
    #: β_Hmax of the entropy schedule, in units of the reward.
    entropy_weight: float = 0.01
    #: `program`: the most probable allocation within [1 − `band`, 1] of the target, by integer programming; in a gap
    #: of the space up to 2 % above a two-sided target.
    #: `argmax`: the most probable format of each layer, repaired by the program only where it misses the target.
    derive: Derivation = "program"
    #: Width of the band below a cap. Below a two-sided target it is 2 % at most, the target's own tolerance.
    band: float = 0.03

    def __post_init__(self) -> None:
        choices = {"quality": Quality, "reward": Reward, "baseline": Baseline, "derive": Derivation}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} does not exist; choose from {', '.join(get_args(literal))}"
                )
        if self.prior != "none":
            _check_prior(self.prior, self.prior_passes)
        for name, low, high in _LIMITS:
            value = getattr(self, name)
            if value is None and name == "prior_strength":
                continue
            whole = name in ("samples_per_step", "prior_images", "prior_passes")
            if not (is_whole if whole else is_number)(value, low, high):
                limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ConfigError(f"{name}={value!r} must be a {'whole ' if whole else ''}number {limit}")
        if self.warmup_fraction > self.explore_fraction:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} must not exceed explore_fraction={self.explore_fraction}"
            )

    def second_look(self, first: Sensitivity) -> TwoPass:
        """The score of the second pass, where there is one. Args: first: of the first pass."""
        return TwoPass(first, self.band, find_score(self.prior))

    @classmethod
    def preset(cls, name: str, /, **changes: Any) -> SearchConfig:
        """The `default` or the `paper` preset, with changes.

        Raises: ConfigError: unknown preset or key, or a change without effect.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"preset={name!r} does not exist; choose from {', '.join(PRESETS)}")
        known = [field.name for field in fields(cls)]
        for key in changes:
            if key not in known:
                hint = did_you_mean(key, known, f"known are {', '.join(known)}")
                raise ConfigError(f"unknown search setting {key!r}{hint}")
        made = replace(cls(**PRESETS[name]), **changes)
        if made.prior_strength is not None and "prior_entropy" in changes:
            raise ConfigError(
                f"prior_entropy={made.prior_entropy} is what prior_strength={made.prior_strength} takes the place of: "
                "leave one of them out"
            )
        if made.prior == "none" and (of_prior := [key for key in changes if key.startswith("prior_")]):
            raise ConfigError(f"{of_prior[0]}={changes[of_prior[0]]!r} has no effect without a prior: leave it out")
        if made.reward == "quality" and "beta" in changes:
            raise ConfigError(f"beta={made.beta} has no effect with reward='quality': leave it out, or set reward")
        return made


def _check_prior(name: Any, passes: Any) -> None:
    """Raises: ConfigError: no score of that name, or one that a search cannot start from."""
    if not isinstance(name, str) or name not in scores():
        raise ConfigError(f"prior={name!r} does not exist; choose from {', '.join(scores())}, none")
    if find_score(name).at_target:
        raise ConfigError(f"prior={name!r} is measured at a target, as prior_passes=2 does: use prior='fisher'")
    if passes == 2 and not find_score(name).again:
        raise ConfigError(f"prior={name!r} is not defined in a quantized model: set prior_passes=1")


_LIMITS: tuple[tuple[str, float, float], ...] = (
    ("prior_entropy", 0, 3),
    ("prior_strength", 0, math.inf),
    ("prior_images", 1, math.inf),
    ("prior_passes", 1, 2),
    ("warmup_fraction", 0, 1),
    ("explore_fraction", 0, 1),
    ("beta", -math.inf, 0),  # positive would reward missing the target
    ("cost_weight", 0, math.inf),
    ("samples_per_step", 1, 64),
    ("baseline_momentum", 0, 1),
    ("policy_learning_rate", 0, math.inf),
    ("entropy_weight", 0, math.inf),
    ("band", 0, 0.5),
)

#: `paper`: uniform sampling for the first quarter, TuNAS' absolute reward on accuracy with a moving baseline, cosine
#: entropy, and the arg-max at the last step as the result (FLIQS, section 3).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {
        "prior": "none",
        "warmup_fraction": 0.25,
        "explore_fraction": 1.0,
        "quality": "accuracy",
        "reward": "absolute",
        "cost_weight": 0.0,
        "baseline": "moving",
        "derive": "argmax",
    },
}
