"""`fold_batchnorm` on models of Transformers: saved, loaded, taken apart."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel

from fliqs_hf import Allocation, FLIQSConfig, fold_batchnorm, make_searchable, quantize
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.nn import packed_layers, quantizable_layers
from tests.helpers.models import images, tiny

CONVOLUTIONAL = {"resnet": 6, "mobilenet_v2": 52, "efficientnet": 22}
REFERENCE = FLIQSConfig(kernels="reference")


def trained(architecture: str) -> Any:
    """With statistics, as after training: those of a new model are 0 and 1."""
    model = tiny(architecture)
    torch.manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.normal_(module.weight)  # of both signs
    return model


def packed(architecture: str, **settings: Any) -> Any:
    model = trained(architecture)
    allocation = Allocation.uniform(quantizable_layers(model), "int4")
    return quantize(model, FLIQSConfig(allocation=allocation, kernels="reference", **settings))


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(images()).logits


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_folded_models_load_as_they_were_saved(architecture: str, tmp_path: Path) -> None:
    model = packed(architecture)
    before, count = logits(model), len(norms(model))
    size = sum(tensor.numel() for tensor in model.state_dict().values())
    folded = fold_batchnorm(model)
    assert len(folded) == count == CONVOLUTIONAL[architecture] and not norms(model)  # every one, in these models
    after = logits(model)
    # Rounded otherwise, an input now and then gets another code of 15 in the next layer: no bound holds for the whole.
    assert (after - before).square().mean() < 0.01 * before.square().mean()
    channels = sum(len(model.get_submodule(name).bias) for name in folded)
    # Gone are four vectors and the number of batches of each norm, and a bias is there instead.
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == size - 3 * channels - count

    model.save_pretrained(tmp_path / "packed")
    again = type(model).from_pretrained(tmp_path / "packed", quantization_config=REFERENCE)
    assert torch.equal(logits(again), after)
    assert again.config.quantization_config.folded == folded
    again.save_pretrained(tmp_path / "again")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("packed", "again")]
    assert files[0] == files[1]

    again.dequantize()
    again.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")
    assert len(norms(plain)) == count
    assert list(plain.state_dict()) == list(tiny(architecture).state_dict())
    assert torch.allclose(logits(plain), logits(again), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("architecture", ["resnet", "mobilenet_v2"])
def test_the_base_of_a_folded_model(architecture: str, tmp_path: Path) -> None:
    model = packed(architecture)
    fold_batchnorm(model)
    model.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = model.base_model(images()).last_hidden_state
        base = AutoModel.from_pretrained(tmp_path / "packed", quantization_config=REFERENCE)
        assert torch.equal(base(images()).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = AutoModel.from_pretrained(tmp_path / "base", quantization_config=REFERENCE)
        assert torch.equal(again(images()).last_hidden_state, expected)
        assert not norms(again)


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_plain_models_stay_of_their_architecture(architecture: str, tmp_path: Path) -> None:
    model = trained(architecture)
    before = logits(model)
    assert len(fold_batchnorm(model)) == CONVOLUTIONAL[architecture]
    assert torch.allclose(logits(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))
    # what is packed from it has norms that only add, which any granularity can do without
    allocation = Allocation.uniform(quantizable_layers(model), "int8")
    quantize(model, FLIQSConfig(allocation=allocation, weight_granularity="per_tensor"))
    fold_batchnorm(model)
    assert not norms(model)


def test_models_without_batch_norms_are_left_alone() -> None:
    for architecture in ("convnext", "vit"):
        model = packed(architecture)
        state = list(model.state_dict())
        assert fold_batchnorm(model) == {} and list(model.state_dict()) == state
        assert model.config.quantization_config.folded is None


def test_layers_in_floating_point_keep_their_norms_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = trained("resnet")
    names = list(quantizable_layers(model))
    quantize(model, Allocation.uniform(names[1:], "int4"))
    with caplog.at_level(logging.WARNING, "fliqs_hf.hf.fold"):
        folded = fold_batchnorm(model)
    assert len(folded) == 5 and norms(model) == [names[0].replace("convolution", "normalization")]
    assert f"{names[0]!r}, which it follows, is not quantized" in caplog.text
    assert fold_batchnorm(model) == {} and len(model.config.quantization_config.folded) == 5  # what is done stays done


def test_a_searchable_model_is_refused() -> None:
    model = trained("resnet")
    make_searchable(model, ["int4"])
    with pytest.raises(ConfigError, match=r"still learn.*fliqs_hf\.quantize"):
        fold_batchnorm(model)


def test_a_config_with_folded_norms_quantizes_other_checkpoints_without(tmp_path: Path) -> None:
    model = packed("resnet")
    fold_batchnorm(model)
    trained("resnet").save_pretrained(tmp_path)
    config = model.config.quantization_config
    config.digests = None
    other = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert len(norms(other)) == 6 and other.config.quantization_config.folded is None
    assert quantize(trained("resnet"), config).config.quantization_config.folded is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folded: folded.update(nowhere="else"), CheckpointError, "'nowhere' as folded"),
        (lambda folded: folded.popitem(), CheckpointError, r"lacks '.*normalization\.weight'"),
        (lambda folded: folded.update({next(iter(folded)): "resnet.embedder"}), ConfigError, "no BatchNorm2d of 8"),
        (lambda folded: folded.update(dict.fromkeys([*folded][:2], "resnet")), ConfigError, "several convol"),
        (lambda folded: folded.update({next(iter(folded)): 3}), ConfigError, "folded: 3 is no name"),
    ],
)
def test_damaged_configs_are_refused(change: Any, error: Any, message: str, tmp_path: Path) -> None:
    model = packed("resnet")
    fold_batchnorm(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"]["folded"])
    file.write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        type(model).from_pretrained(tmp_path, quantization_config=FLIQSConfig(check_integrity=False))
    with pytest.raises((CheckpointError, ConfigError)):
        type(model).from_pretrained(tmp_path)


def test_folded_is_not_for_the_user_to_give() -> None:
    with pytest.raises(ConfigError, match=r"folded=\{'a': 'b'\} is what folding a packed model writes"):
        FLIQSConfig(folded={"a": "b"})


def test_copies_and_casts_of_folded_models(tmp_path: Path) -> None:
    model = packed("resnet")
    fold_batchnorm(model)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    twin.dequantize()
    assert len(norms(twin)) == 6 and not norms(model) and packed_layers(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.resnet.embedder.embedder.convolution.bias.dtype == torch.bfloat16
