"""Untrained models: sizes and settings, tried on the meta device before there are data."""

from __future__ import annotations

import pytest
import torch

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.models import load_classifier, read_classifier
from fliqs_hf.training.scratch import scratch_config

PLAIN = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 8}
SMALL = {
    "vit": PLAIN,
    "deit": PLAIN,
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "hiera": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "query_stride": [2, 2]},
}  # fmt: skip


@pytest.mark.parametrize("model_type", SMALL)
def test_any_architecture_takes_an_image_size(model_type: str) -> None:
    """ResNet has no such setting, DeiT two classifiers, Hiera a side for each direction."""
    overrides = SMALL[model_type] | ({"image_size": [64, 64]} if model_type == "hiera" else {})
    size = None if model_type == "hiera" else 64
    model, processor, trained = load_classifier(
        ["a", "b", "c"], model_type=model_type, config_overrides=overrides, image_size=size
    )
    assert dict(processor.size) == {"height": 64, "width": 64} and not trained
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 3)


def test_the_check_changes_no_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    scratch_config("vit", SMALL["vit"], 64)
    assert torch.equal(torch.rand(3), expected)


def test_a_tower_inside_gets_the_size() -> None:
    config, processor = read_classifier(model_type="clip", image_size=64)
    assert config.vision_config.image_size == 64 and dict(processor.size) == {"height": 64, "width": 64}


@pytest.mark.parametrize(("model_type", "size", "named"), [("swin", 64, "64 × 64"), ("imagegpt", None, "imagegpt")])
def test_what_takes_no_such_images_is_named(model_type: str, size: int | None, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        scratch_config(model_type, {}, size)
