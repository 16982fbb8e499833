"""Every argument of every settings class, given everything that it is not: a typed error that names it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from fliqs_hf import Allocation, FLIQSConfig
from fliqs_hf.allocation import LayerFormats
from fliqs_hf.checks import check_fields
from fliqs_hf.cost import LayerInfo, Target
from fliqs_hf.errors import AllocationError, ConfigError, FliqsError, FormatError
from fliqs_hf.formats import parse
from fliqs_hf.nn import QuantizerSettings
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.training.config import TrainConfig

WRONG: list[Any] = [
    5, -1, 1.5, math.nan, math.inf, True, "", "x", b"x", [], [5], ["x", None], (), ("x", 5), {}, {5: 5}, {"a": 5},
    object(), None,
]  # fmt: skip

#: class -> arguments that are right
CLASSES: dict[type, dict[str, Any]] = {
    FLIQSConfig: {},
    LayerFormats: {"weight": parse("int4"), "activation": None},
    Target: {"kind": "bits", "value": 4.0},
    QuantizerSettings: {},
    SearchConfig: {},
    TrainConfig: {"max_steps": 5},
    LayerInfo: {"name": "a", "kind": "linear", "macs": 1, "weight_numel": 1, "out_channels": 1, "input_group": 0},
}

#: (class, argument) -> those of WRONG that are right after all
NUMBERS, COUNTS = (5, 1.5), (5,)
RIGHT: dict[tuple[type, str], tuple[Any, ...]] = {
    (FLIQSConfig, "allocation"): ({}, None), (FLIQSConfig, "activation_format"): (None,),
    (FLIQSConfig, "overrides"): ({}, None), (FLIQSConfig, "modules_to_not_convert"): ([], (), None),
    (FLIQSConfig, "search_space"): (None,),
    (FLIQSConfig, "folded"): (None,), (FLIQSConfig, "check_integrity"): (True,), (FLIQSConfig, "digests"): (None,),
    (TrainConfig, "warmup_steps"): (5, None), (TrainConfig, "compile_backend"): (None,),
    (LayerFormats, "activation"): (None,),
    (Target, "value"): NUMBERS, (Target, "cap"): (True,),
    (SearchConfig, "prior_entropy"): (1.5,), (SearchConfig, "prior_strength"): (*NUMBERS, None),
    (SearchConfig, "prior_images"): COUNTS, (SearchConfig, "beta"): (-1,), (SearchConfig, "cost_weight"): NUMBERS,
    (SearchConfig, "samples_per_step"): COUNTS, (SearchConfig, "policy_learning_rate"): NUMBERS,
    (SearchConfig, "entropy_weight"): NUMBERS,
    (TrainConfig, "seed"): (5, -1), (TrainConfig, "learning_rate"): NUMBERS, (TrainConfig, "weight_decay"): NUMBERS,
    (TrainConfig, "max_grad_norm"): NUMBERS, (TrainConfig, "feature_weight"): NUMBERS,
    **{(TrainConfig, name): COUNTS for name in (
        "max_steps", "batch_size", "gradient_accumulation_steps", "logging_steps", "save_steps", "eval_steps",
        "workers",
    )},
    (LayerInfo, "name"): ("x",), (LayerInfo, "input_group"): (5, -1),
    **{(LayerInfo, name): COUNTS for name in (
        "macs", "weight_numel", "out_channels", "input_numel", "output_numel",
    )},
}  # fmt: skip

#: Whose checks are elsewhere: a version is compared with what a checkpoint says.
ELSEWHERE = {(FLIQSConfig, "format_version")}

ARGUMENTS = [
    (cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls) if (cls, field.name) not in ELSEWHERE
]  # fmt: skip


def is_right(value: Any, right: tuple[Any, ...]) -> bool:
    return any(type(value) is type(other) and value == other for other in right)


@pytest.mark.parametrize(("cls", "name"), ARGUMENTS, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_of_another_type_is_refused_by_name(cls: Any, name: str) -> None:
    for value in WRONG:
        arguments = {**CLASSES[cls], name: value}
        if is_right(value, RIGHT.get((cls, name), ())):
            cls(**arguments)
            continue
        with pytest.raises(FliqsError) as caught:
            cls(**arguments)
        # It names the argument, or what it is in words, and quotes the value or the entry that is wrong.
        assert len(str(caught.value)) > 20 and "object has no attribute" not in str(caught.value)


CALLS: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "Allocation": (Allocation, ({},)),
    "Allocation.from_dict": (Allocation.from_dict, ({},)),
    "Allocation.load": (Allocation.load, ()),
    "Allocation.uniform names": (lambda value: Allocation.uniform(value, "int8"), ([], (), {}, {"a": 5})),
    "Allocation.uniform weight": (lambda value: Allocation.uniform(["a"], value), ()),
    "Allocation.uniform activation": (lambda value: Allocation.uniform(["a"], "int8", value), (None,)),
    "LayerFormats.of weight": (lambda value: LayerFormats.of(value, None), ()),
    "LayerFormats.of activation": (lambda value: LayerFormats.of("int8", value), (None,)),
    "Target.of": (lambda value: Target.of(target_bits=value), NUMBERS),
    "SearchConfig.preset": (SearchConfig.preset, ()),
    "an override": (lambda value: FLIQSConfig(overrides={"*": value}), ()),
    "an override's weight": (lambda value: FLIQSConfig(overrides={"*": {"weight": value}}), ()),
    "an entry of an allocation": (lambda value: FLIQSConfig(allocation={"a": value}), ()),
    "an entry of a space": (lambda value: FLIQSConfig(search_space=[value]), ()),
    "a pattern": (lambda value: FLIQSConfig(modules_to_not_convert=[value]), ("x",)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_refuse_what_is_of_another_type(name: str) -> None:
    call, right = CALLS[name]
    for value in WRONG:
        if is_right(value, right):
            call(value)
            continue
        with pytest.raises(FliqsError):
            call(value)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: FLIQSConfig(overrides="x"), ConfigError, "overrides='x': give a mapping"),
    (lambda: FLIQSConfig(modules_to_not_convert=[5]), ConfigError, "modules_to_not_convert: 5 is no pattern"),
    (lambda: FLIQSConfig(allocation={5: "int8"}), AllocationError, "5"),
    (lambda: FLIQSConfig(search_space=5), FormatError, "a search space is a name or a list of formats, not 5"),
    (lambda: FLIQSConfig(overrides={5: "int8"}), ConfigError, "overrides: 5 is no pattern"),
    (lambda: TrainConfig(5, quality="los"), ConfigError, "quality='los' must be one of 'loss', 'accuracy'"),
    (lambda: TrainConfig(5.5), ConfigError, "max_steps=5.5 must be a whole number"),
    (lambda: TrainConfig(5, learning_rate="1e-4"), ConfigError, "learning_rate='1e-4' must be a number"),
    (lambda: LayerFormats("int8", None), FormatError, "weight='int8' is no format"),
    (lambda: Allocation({"a": "int8"}), AllocationError, "'a': 'int8' is no LayerFormats"),
    (lambda: Allocation.uniform("classifier", "int8"), AllocationError, "names='classifier' must be a list"),
])  # fmt: skip
def test_messages_name_argument_and_value(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_numbers_of_numpy_are_numbers() -> None:
    config = TrainConfig(numpy.int64(5), learning_rate=numpy.float32(0.1))  # type: ignore[arg-type]
    check_fields(config, ConfigError)
