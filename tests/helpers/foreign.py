"""Tiny random models whose layers are kept, tied or read in ways that plain classifiers do not have."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2],
         "window_size": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
_DETR = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
         "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 32, "num_queries": 4}  # fmt: skip


def mask2former() -> Any:
    config = hf.Mask2FormerConfig(
        backbone_config=hf.SwinConfig(**_SWIN), feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
        num_queries=4, num_labels=3,
    )  # fmt: skip
    return hf.Mask2FormerForUniversalSegmentation(config)


def maskformer() -> Any:
    config = hf.MaskFormerConfig(
        backbone_config=hf.MaskFormerSwinConfig(**_SWIN), decoder_config=hf.DetrConfig(**_DETR), fpn_feature_size=32,
        mask_feature_size=32, num_labels=3,
    )  # fmt: skip
    return hf.MaskFormerForInstanceSegmentation(config)


def detr_segmentation() -> Any:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=3,
        **_DETR,
    )  # fmt: skip
    return hf.DetrForSegmentation(config)


def encoder_decoder() -> Any:
    """ViT and GPT-2: the output layer is tied to the word embeddings, and the rest of GPT-2 has no `nn.Linear`."""
    encoder = hf.ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    decoder = hf.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=16, add_cross_attention=True, is_decoder=True
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 0
    return hf.VisionEncoderDecoderModel(config=config)


def built(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()
