"""Augmentation of whole batches with kornia, seeded by the step like everything else that is random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fliqs_hf.errors import ConfigError
from fliqs_hf.optional import needed_for

NAMES = ("flip", "crop", "randaugment", "mixup", "cutmix")


def check_augment(names: Sequence[str]) -> None:
    """Raises: ConfigError: an unknown name, or mixup together with cutmix."""
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"augmentation {unknown[0]!r} does not exist; choose from {', '.join(NAMES)}")
    if "mixup" in names and "cutmix" in names:
        raise ConfigError("choose mixup or cutmix, not both")


class BatchAugment:
    """Random horizontal flips, shifted crops, RandAugment, mixup and cutmix of normalised images.

    Implements `training.step.Augment`: (images [batch, C, H, W], labels [batch]) -> images and labels, or images and
    class probabilities [batch, classes] with mixup or cutmix.

    Raises: ConfigError: an unknown name, or mixup together with cutmix. DependencyError: kornia is not installed.
    """

    def __init__(self, names: Sequence[str], num_labels: int, mean: Sequence[float], std: Sequence[float]) -> None:
        check_augment(names)
        with needed_for("augmentation"):
            import kornia.augmentation as K
        self.num_labels = num_labels
        steps: list[Any] = []
        if "flip" in names:
            steps.append(K.RandomHorizontalFlip())
        if "crop" in names:
            steps.append(K.RandomAffine(0, translate=(0.1, 0.1), scale=(0.9, 1.1), padding_mode="reflection"))
        if "randaugment" in names:
            mean_, std_ = torch.tensor(mean), torch.tensor(std)
            steps += [K.Denormalize(mean_, std_), K.auto.RandAugment(n=2, m=9), K.Normalize(mean_, std_)]
        self.images = K.AugmentationSequential(*steps, data_keys=["input"]) if steps else None
        labelled = {"p": 1.0, "data_keys": ["input", "class"]}
        self.mix = None
        if "mixup" in names:
            self.mix = K.RandomMixUpV2(**labelled)
        elif "cutmix" in names:
            self.mix = K.RandomCutMixV2(**labelled, use_correct_lambda=True)
        self.weight_is_own = "cutmix" in names

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.images is not None:
            images = self.images(images)
        if self.mix is None:
            return images, labels
        images, mixed = self.mix(images, labels)
        mixed = mixed.reshape(-1, 3)  # label, label of the other image, weight of one of them
        own = mixed[:, 2:] if self.weight_is_own else 1 - mixed[:, 2:]
        one = functional.one_hot(mixed[:, 0].long(), self.num_labels)
        other = functional.one_hot(mixed[:, 1].long(), self.num_labels)
        return images, own * one + (1 - own) * other
