"""The optimizer of a training run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(decay_groups(model, weight_decay), lr=learning_rate)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only: not for biases, norms, scales, position embeddings and tokens."""
    spared = (
        "position_embedding",
        "cls_token",
        "distillation_token",
        "mask_token",
        "register_tokens",  # DINOv2 with registers
        "relative_position_bias_table",
        "attention_biases",  # LeViT, [heads, offsets]
        "logit_scale",  # Swin v2, [heads, 1, 1]
        "layer_scale",  # SwiftFormer, [channels, 1, 1]
        "grn.",  # ConvNeXt v2: weight and bias of a norm, [1, 1, 1, channels]
        "head.probe",  # SigLIP: the query that pools patches
    )
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (rest if parameter.dim() < 2 or any(word in name for word in spared) else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
