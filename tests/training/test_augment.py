"""Batch augmentation: shapes, label mixtures, and randomness from the global generator alone."""

from __future__ import annotations

import pytest
import torch

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.augment import NAMES, BatchAugment

MEAN = STD = [0.5, 0.5, 0.5]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.arange(6)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name: str) -> None:
    augment = BatchAugment([name], 6, MEAN, STD)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(*batch()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])
    assert not torch.equal(results[0][0], batch()[0])
    assert results[0][0].shape == (6, 3, 16, 16)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_images_are(name: str) -> None:
    """Images that hold their own class number: the mixture's mean must be the expected class of its label."""
    torch.manual_seed(0)
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 16, 16).clone()
    mixed, probabilities = BatchAugment([name], 6, MEAN, STD)(images, torch.arange(6))
    assert torch.allclose(probabilities.sum(-1), torch.ones(6))
    assert (probabilities > 0).sum(-1).max() == 2
    expected = probabilities @ torch.arange(6.0)
    assert torch.allclose(mixed.mean((1, 2, 3)), expected, atol=1e-4)  # float32 means of 768 pixels


@pytest.mark.parametrize(("names", "named"), [(["blur"], "blur"), (["mixup", "cutmix"], "not both")])
def test_bad_names(names: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BatchAugment(names, 6, MEAN, STD)
