"""Weights and configuration of a packed checkpoint belong together, or it is not loaded."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTForImageClassification,
)

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.hf import quantizer as quantizer_module
from fliqs_hf.hf.config import FORMAT_VERSION
from fliqs_hf.hf.quantizer import FLIQSHfQuantizer
from tests.helpers.models import images, tiny

LAYER = "vit.layers.0.mlp.fc1"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    quantize(tiny("vit"), FLIQSConfig(weight_format="int4")).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForImageClassification.from_pretrained(folder, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(images()).logits
    return answer


def edit(folder: Path, change: Any, file: str = "config.json") -> None:
    data = json.loads((folder / file).read_text())
    change(data)
    (folder / file).write_text(json.dumps(data))


def change_codes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{LAYER}.weight"][0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("checksum", ["crc32", "sha256"])
def test_a_changed_code_is_named(checksum: str, tmp_path: Path) -> None:
    quantize(tiny("vit"), FLIQSConfig(checksum=checksum)).save_pretrained(tmp_path)
    assert load(tmp_path).config.quantization_config.checksum == checksum
    change_codes(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{LAYER}\.weight in .*is not what was saved.*{checksum}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_eps", 1e-3),
        ("hidden_act", "relu"),
        ("num_attention_heads", 4),
        ("dtype", "bfloat16"),
        ("architectures", ["ViTModel"]),
        ("chunk_size_feed_forward", 1),
    ],
)
def test_a_changed_setting_is_named(packed: Path, key: str, value: Any) -> None:
    edit(packed, lambda config: config.update({key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json (has|lacks) {key}"):
        load(packed)


def test_a_setting_that_is_lost_is_named(packed: Path) -> None:
    edit(packed, lambda config: config.pop("layer_norm_eps"))
    with pytest.raises(CheckpointError, match=r"config\.json lacks layer_norm_eps"):
        load(packed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda q: q["allocation"][LAYER].update(weight="e2m1"), "allocation"),  # the same bits, another format
        (lambda q: q["allocation"][LAYER].update(activation="e4m3"), "allocation"),
        (lambda q: q.update(activation_granularity="per_tensor"), "activation_granularity"),
        (lambda q: q.update(weight_scale="mse"), "weight_scale"),
    ],
)
@pytest.mark.parametrize("beside", [True, False], ids=["config.json", "config="])
def test_another_quantization_of_the_same_bits_is_refused(packed: Path, change: Any, named: str, beside: bool) -> None:
    if beside:
        edit(packed, lambda config: change(config["quantization_config"]))
        config = AutoConfig.from_pretrained(packed)
    else:
        config = AutoConfig.from_pretrained(packed)
        change(config.quantization_config)
        (packed / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"quantization_config\.{named}"):
        ViTForImageClassification.from_pretrained(packed, config=config)


def test_weights_of_another_model_are_refused(packed: Path, tmp_path: Path) -> None:
    quantize(tiny("vit", seed=1), FLIQSConfig(weight_format="int4")).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", packed)
    with pytest.raises(CheckpointError, match="of another model"):
        load(packed)


def test_what_may_be_changed(packed: Path) -> None:
    """Names of classes in the file; settings by keyword or in a config that is given; another class."""
    expected = logits(load(packed))
    names = {str(i): name for i, name in enumerate(["ant", "bee", "cow", "dog", "elk"])}
    edit(packed, lambda config: config.update(id2label=names, label2id={n: int(i) for i, n in names.items()}))
    assert torch.equal(logits(load(packed)), expected)
    assert load(packed).config.id2label[2] == "cow"
    assert load(packed, layer_norm_eps=1e-3).config.layer_norm_eps == 1e-3
    config = AutoConfig.from_pretrained(packed)
    config.hidden_act = "relu"
    assert load(packed, config=config).config.hidden_act == "relu"
    assert AutoModel.from_pretrained(packed).config.quantization_config.allocation
    assert load(packed, dtype=torch.bfloat16).dtype is torch.bfloat16


def test_who_must_can_load_without(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_codes(packed)
    damaged = FLIQSConfig(check_integrity=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformers: the rest of the argument has no effect
        model = load(packed, quantization_config=damaged)
        with pytest.raises(CheckpointError, match="check_integrity=False"):
            load(packed, quantization_config=FLIQSConfig())
    assert model.config.quantization_config.check_integrity  # what it saves can be trusted again
    monkeypatch.setenv("FLIQS_CHECK_INTEGRITY", "0")
    assert torch.equal(logits(load(packed)), logits(model))


def test_a_checkpoint_cannot_switch_off_its_check(packed: Path) -> None:
    edit(packed, lambda config: config["quantization_config"].update(check_integrity=False))
    with pytest.raises(ConfigError, match="unknown key 'check_integrity'"):
        load(packed)


def older(folder: Path) -> None:
    """Make a checkpoint what it was before there were digests."""

    def change(config: dict[str, Any]) -> None:
        del (
            config["fusion_config"],
            config["quantization_config"]["digests"],
            config["quantization_config"]["checksum"],
        )
        config["quantization_config"]["format_version"] = 1

    edit(folder, change)


def test_a_checkpoint_without_digests_loads_with_a_warning(packed: Path, tmp_path: Path) -> None:
    expected = logits(load(packed))
    older(packed)
    with pytest.warns(UserWarning, match="before checkpoints had digests"):
        model = load(packed)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] == FORMAT_VERSION and stored["digests"]["tensors"]


def test_digests_cannot_get_lost(packed: Path) -> None:
    edit(packed, lambda config: config["quantization_config"].pop("digests"))
    with pytest.raises(CheckpointError, match="lost its digests"):
        load(packed)


@pytest.mark.parametrize("size", ["50GB", "5KB"])
@pytest.mark.parametrize("architecture", ["vit", "swin", "clip", "resnet"])
def test_two_saves_give_the_same_bytes(architecture: str, size: str, tmp_path: Path) -> None:
    model = quantize(tiny(architecture), FLIQSConfig())
    model.save_pretrained(tmp_path / "a", max_shard_size=size)
    model.save_pretrained(tmp_path / "b", max_shard_size=size)
    load(tmp_path / "a").save_pretrained(tmp_path / "c", max_shard_size=size)
    # Transformers writes the dtype of CLIP's parts only after loading.
    for folder in ("b",) if architecture == "clip" else ("b", "c"):
        assert contents(tmp_path / folder) == contents(tmp_path / "a")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_model_that_was_changed_after_saving_is_saved_anew(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    model.save_pretrained(tmp_path / "a")
    model.vit.layernorm.bias.data += 1
    copy.deepcopy(model).save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), logits(model))


def test_a_saved_model_can_be_dequantized(packed: Path, tmp_path: Path) -> None:
    model = load(packed)
    model.save_pretrained(tmp_path / "a")  # leaves the name of the dtype in the config, not the dtype
    assert type(model.dequantize().classifier) is torch.nn.Linear


def test_a_file_that_is_replaced_while_it_is_loaded(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the check, before the tensors are read."""
    check = quantizer_module.check_integrity

    def replaced(files: list[str], *arguments: Any) -> None:
        check(files, *arguments)
        change_codes(packed)

    monkeypatch.setattr(quantizer_module, "check_integrity", replaced)
    with pytest.raises(CheckpointError, match="was replaced while it was loaded"):
        load(packed)


#: Where a loading model is when somebody writes: at the beginning and the end of each of these.
MOMENTS = {
    "configuration": (PreTrainedConfig, "get_config_dict"),
    "digests": (quantizer_module, "check_integrity"),
    "swapping layers": (FLIQSHfQuantizer, "_process_model_before_weight_loading"),
    "after the tensors": (FLIQSHfQuantizer, "_process_model_after_weight_loading"),
}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("written", [("config.json",), ("model.safetensors",), ("config.json", "model.safetensors")])
def test_readers_get_one_model_or_an_error(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[str, ...], moment: str, late: bool
) -> None:
    """While another model is saved into the folder that they read, of which they may meet any part."""
    other = tiny("vit", 1)
    other.config.layer_norm_eps = 1e-3  # the weights of one under the configuration of the other are neither
    quantize(other, FLIQSConfig(weight_format="int4")).save_pretrained(tmp_path / "other")
    other = load(tmp_path / "other")
    expected = [logits(load(packed)), logits(other)]
    owner, name = MOMENTS[moment]
    original, calls = getattr(owner, name), 0

    def meanwhile(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if late:
            result = original(*arguments, **more)
        for file in written if calls == 1 else ():
            shutil.copy(tmp_path / "other" / file, packed / f"{file}.new")
            (packed / f"{file}.new").rename(packed / file)
        return result if late else original(*arguments, **more)

    monkeypatch.setattr(owner, name, meanwhile)
    try:
        found = logits(load(packed))
    except CheckpointError:
        found = None
    assert calls
    assert found is None or any(torch.equal(found, whole) for whole in expected)
