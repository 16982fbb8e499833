"""Tiny random models of every architecture that the package promises to work with."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}
_VISION = {**_VIT, "image_size": 32, "patch_size": 8}

#: name -> (model class, configuration)
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**_VIT, **_IMAGE)),
    "deit": (hf.DeiTForImageClassification, lambda: hf.DeiTConfig(**_VIT, **_IMAGE)),
    "deit-distilled": (hf.DeiTForImageClassificationWithTeacher, lambda: hf.DeiTConfig(**_VIT, **_IMAGE)),
    "beit": (hf.BeitForImageClassification, lambda: hf.BeitConfig(**_VIT, **_IMAGE, use_relative_position_bias=True)),
    "dinov2": (hf.Dinov2ForImageClassification, lambda: hf.Dinov2Config(**_VIT, **_IMAGE)),
    "swin": (
        hf.SwinForImageClassification,
        lambda: hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=5
        ),
    ),
    "siglip": (
        hf.SiglipForImageClassification,
        lambda: hf.SiglipConfig(vision_config=_VISION, text_config={**_VIT, "vocab_size": 99}, num_labels=5),
    ),
    "clip": (
        hf.CLIPForImageClassification,
        lambda: hf.CLIPConfig(vision_config=_VISION, text_config={**_VIT, "vocab_size": 99}, num_labels=5),
    ),
    "resnet": (
        hf.ResNetForImageClassification,
        lambda: hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
        ),
    ),
    "mobilenet_v2": (
        hf.MobileNetV2ForImageClassification,
        lambda: hf.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=5),
    ),
    "efficientnet": (
        hf.EfficientNetForImageClassification,
        lambda: hf.EfficientNetConfig(
            image_size=32, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, num_labels=5
        ),
    ),
    "convnext": (
        hf.ConvNextForImageClassification,
        lambda: hf.ConvNextConfig(image_size=32, hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5),
    ),
}  # fmt: skip


def tiny(architecture: str, seed: int = 0) -> Any:
    """A tiny random model in evaluation mode, with 5 labels and 32 × 32 images."""
    cls, config = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model = cls(config())
    for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1: give them content
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model.eval()


def images(count: int = 3, seed: int = 1) -> torch.Tensor:
    """[count, 3, 32, 32], float32."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
