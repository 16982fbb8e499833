"""The search in a training loop of somebody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForImageClassification

import fliqs_hf
from fliqs_hf import Search, SearchConfig, Target
from fliqs_hf.cost import bops
from fliqs_hf.errors import ConfigError, DataError, TargetError
from fliqs_hf.nn import packed_layers
from tests.helpers.models import images, tiny

CONFIG = SearchConfig(prior_images=16, explore_fraction=0.5)
SPACE = ["int3", "int4", "e2m1", "int8"]
BITS = Target.of(target_bits=4)


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(images(8, seed=seed), torch.arange(8) % 5) for seed in range(count)]


def run(search: Search, data: list[Any]) -> list[float]:
    optimizer = torch.optim.SGD(search.model.parameters(), lr=0.05)
    losses = []
    for batch in data:
        loss = search.step(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_a_loop_of_ones_own_searches(tmp_path: Path) -> None:
    model, data = tiny("vit").train(), batches()
    weight = model.classifier.weight
    search = Search(model, BITS, steps=6, images=data, config=CONFIG, search_space=SPACE)
    assert model.classifier.weight is weight, "an optimizer made before the search would train another parameter"
    before = weight.detach().clone()
    phases = []
    for batch in data:
        phases.append(search.searching)
        run(search, [batch])
    assert phases == [True] * 3 + [False] * 3
    assert not torch.equal(before, weight)
    result = search.finish()
    assert result.cost == bops(result.layers, result.allocation) and 0.97 <= result.cost / result.target_cost <= 1
    expected = functional.cross_entropy(model.eval()(data[0][0]).logits, data[0][1])
    result.save_pretrained(tmp_path)
    packed = AutoModelForImageClassification.from_pretrained(
        tmp_path, quantization_config=fliqs_hf.FLIQSConfig(kernels="reference")
    )
    assert packed.config.quantization_config.allocation == result.allocation
    assert len(packed_layers(packed)) == len(result.allocation)
    found = functional.cross_entropy(packed(data[0][0]).logits, data[0][1])
    assert torch.allclose(expected, found, atol=1e-5)  # kernels may sum in another order
    assert result.quantize() is result.quantize()


def test_the_same_seed_finds_the_same_and_batches_may_be_dictionaries() -> None:
    found = []
    for as_dictionary in (False, True):
        data: list[Any] = batches()
        if as_dictionary:
            data = [{"pixel_values": x, "labels": y} for x, y in data]
        search = Search(tiny("vit"), BITS, steps=6, images=data, config=CONFIG, search_space=SPACE, seed=3)
        found.append((run(search, data), search.finish().allocation))
    assert found[0] == found[1]


def test_further_samples_are_compared_and_do_not_train() -> None:
    config = SearchConfig(prior_images=16, explore_fraction=0.5, samples_per_step=3)
    search = Search(tiny("vit"), BITS, steps=6, images=batches(), config=config, search_space=SPACE)
    seen: list[Tensor] = []
    end = search._search.end_step
    search._search.end_step = lambda step, quality: seen.append(quality) or end(step, quality)  # type: ignore[func-returns-value, method-assign]
    losses = run(search, batches(4))
    assert [len(quality) for quality in seen] == [3, 3, 3, 1]
    assert [float(-quality[0]) for quality in seen] == losses
    assert all(len(set(quality.tolist())) > 1 for quality in seen[:3])


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"images": None}, ConfigError, "give images="),
    ({"images": iter(batches())}, ConfigError, "once only"),
    ({"images": [{"pixels": 1}]}, ConfigError, "a batch is .*with .'pixels'"),
    ({"steps": 0}, ConfigError, "steps=0"),
    ({"target": Target.of(target_bits=1)}, TargetError, "target"),
    ({"search_space": ["int99x"]}, fliqs_hf.errors.FormatError, "int99x"),
])  # fmt: skip
def test_what_cannot_work_leaves_the_model_alone(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    model = tiny("vit")
    before = [type(module) for module in model.modules()]
    settings = {"target": BITS, "steps": 6, "images": batches(), "config": CONFIG, "search_space": SPACE, **changes}
    with pytest.raises(error, match=words):
        Search(model, settings.pop("target"), **settings)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize("batch", [
    5, [], (images(2),), (images(2), torch.zeros(3, dtype=torch.int64)), (images(2), torch.zeros(2)),
    (images(2), torch.tensor([0, 9])), {"pixel_values": images(2)},
])  # fmt: skip
def test_bad_batches_are_refused(batch: Any) -> None:
    search = Search(tiny("vit"), BITS, steps=6, images=batches(2), config=CONFIG, search_space=SPACE)
    with pytest.raises((ConfigError, DataError), match=r"a batch is|of a classifier|a label that is not"):
        search.step(batch)


def test_without_a_prior_no_images_are_needed() -> None:
    search = Search(tiny("vit"), BITS, steps=2, config=SearchConfig(prior="none"), search_space=SPACE)
    assert len(run(search, batches(2))) == 2
    assert search.finish().allocation
