"""Models that keep, tie or read layers in ways of their own: every way of quantizing gives the same, bit for bit."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, make_searchable, quantize
from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import AllocationError, ConfigError, DataError, FormatError
from fliqs_hf.hf.checkpoint import read_header
from fliqs_hf.nn import format_switch, packed_layers, quantizable_layers, select
from fliqs_hf.ptq import calibrate
from tests.helpers.foreign import built, detr_segmentation, encoder_decoder, mask2former, maskformer
from tests.helpers.models import images, tiny

#: name -> (model, keyword arguments of its forward pass, layers that stay in floating point)
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Tensor], list[str]]] = {
    # Mask heads keep their layers in a list, which is what they run.
    "mask2former": (mask2former, {"pixel_values": torch.rand(1, 3, 64, 64)}, []),
    "maskformer": (maskformer, {"pixel_values": torch.rand(1, 3, 64, 64)}, []),
    "detr": (detr_segmentation, {"pixel_values": torch.rand(1, 3, 64, 64)}, ["bbox_attention.k_proj"]),
    "encoder-decoder": (
        encoder_decoder,
        {"pixel_values": torch.rand(1, 3, 32, 32), "decoder_input_ids": torch.tensor([[0, 3, 2]])},
        ["decoder.lm_head"],
    ),
}


def same(model: Any, other: Any, arguments: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        outputs = [[t for t in m(**arguments).to_tuple() if isinstance(t, Tensor)] for m in (model, other)]
    return bool(outputs[0]) and all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_quantizing_gives_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIQS_KERNELS", "reference")  # the path that equals the searchable model bit for bit
    make, arguments, left = MODELS[name]
    model = built(make)
    model.save_pretrained(tmp_path / "fp32")
    plain = type(model).from_pretrained(tmp_path / "fp32")
    searchable = copy.deepcopy(model)
    switch = make_searchable(searchable, ["int4", "int8"])
    assert not set(left) & set(switch.names)
    allocation = Allocation.uniform(switch.names, "int4")
    switch.set_allocation(allocation)
    assert not same(searchable, plain, arguments)

    packed = quantize(model, FLIQSConfig(weight_format="int4", activation_format="int4"))
    assert dict(packed.config.quantization_config.allocation) == dict(allocation)
    assert same(packed, searchable, arguments)
    fly = type(model).from_pretrained(tmp_path / "fp32", quantization_config=FLIQSConfig(allocation=allocation))
    assert same(fly, searchable, arguments)
    loaded_space = type(model).from_pretrained(
        tmp_path / "fp32", quantization_config=FLIQSConfig(search_space=["int4"])
    )
    assert format_switch(loaded_space).names == switch.names
    assert same(loaded_space, searchable, arguments)

    for number, source in enumerate((packed, fly)):
        source.save_pretrained(tmp_path / f"packed{number}")
        again = type(model).from_pretrained(tmp_path / f"packed{number}")
        assert same(again, searchable, arguments)
        assert packed_layers(again).keys() == set(switch.names)
    again.dequantize()
    assert not packed_layers(again)
    assert not same(again, searchable, arguments) and not same(again, plain, arguments)
    for layer in left:
        with pytest.raises(AllocationError, match=f"'{layer}', which stays in floating point"):
            quantize(plain, Allocation.uniform([*switch.names, layer], "int4"))
    assert not packed_layers(plain)


def test_tied_weights_are_counted_in_fp32_and_stored_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, arguments, _ = MODELS["encoder-decoder"]
    model = built(make)
    select._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="fliqs_hf.nn"):
        layers = {layer.name: layer for layer in trace_layers(model, arguments)}
        quantize(model, FLIQSConfig())
    said = [record for record in caplog.records if "'decoder.lm_head' stays in floating point" in record.message]
    assert len(said) == 1
    tied = layers["decoder.transformer.wte"]  # three tokens, 16 channels, 20 words
    assert (tied.kind, tied.macs) == ("fp32", 3 * 16 * 20)
    assert layers["decoder.transformer.h.0.attn.c_attn"].kind == "transposed_linear"  # GPT-2's Conv1D
    model.save_pretrained(tmp_path)
    stored = read_header(str(tmp_path / "model.safetensors"))
    assert len({"decoder.lm_head.weight", "decoder.transformer.wte.weight"} & stored.keys()) == 1
    again = type(model).from_pretrained(tmp_path)
    assert again.decoder.lm_head.weight is again.decoder.transformer.wte.weight


def test_another_number_of_labels_keeps_the_new_head_in_floating_point(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    for dtype in (torch.float32, torch.bfloat16):
        with caplog.at_level(logging.WARNING, logger="fliqs_hf.hf"):
            model = AutoModelForImageClassification.from_pretrained(
                tmp_path / "fp32", num_labels=7, ignore_mismatched_sizes=True, dtype=dtype,
                quantization_config=FLIQSConfig(),
            )  # fmt: skip
        assert "'classifier' is new, not of the checkpoint, and stays in floating point" in caplog.text
        assert type(model.classifier) is nn.Linear and model.classifier.weight.dtype is dtype
        assert model.classifier.weight.abs().max() < 1  # initialized, not whatever lay in memory
        assert len(packed_layers(model)) == 13 and "classifier" not in model.config.quantization_config.allocation
        pixels = images().to(dtype)
        assert model(pixels).logits.shape == (3, 7)
        model.save_pretrained(tmp_path / "packed")
        again = AutoModelForImageClassification.from_pretrained(tmp_path / "packed", dtype=dtype)
        assert torch.equal(again(pixels).logits, model(pixels).logits)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # as for every model of Transformers
        AutoModelForImageClassification.from_pretrained(
            tmp_path / "fp32", num_labels=7, quantization_config=FLIQSConfig()
        )


@pytest.mark.parametrize("settings", [{}, {"search_space": ["int4"]}], ids=str)
def test_a_model_of_which_nothing_can_be_quantized_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    config = FLIQSConfig(modules_to_not_convert=["*"], **settings)
    tiny("vit").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="ViTForImageClassification has no layer left"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config)


def test_a_weight_that_cannot_be_packed_is_named(tmp_path: Path) -> None:
    model = tiny("vit")
    model.classifier.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"^classifier\.weight: cannot pack a weight that holds NaN"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=FLIQSConfig())


def test_a_searchable_model_is_saved_with_names_in_place_of_expressions(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    config = FLIQSConfig(search_space=["int4"], modules_to_not_convert=["re:class.*|.*patch_embeddings.*", "*.q_proj"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "fp32", quantization_config=config)
    model.save_pretrained(tmp_path / "search")
    stored = json.loads((tmp_path / "search/config.json").read_text())["quantization_config"]
    patches = "vit.embeddings.patch_embeddings.projection"
    assert sorted(stored["modules_to_not_convert"]) == ["*.q_proj", "classifier", patches]
    assert config.modules_to_not_convert == ["re:class.*|.*patch_embeddings.*", "*.q_proj"]  # the user's own
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "search")
    assert format_switch(again).names == format_switch(model).names
    assert len(format_switch(again).names) == 10 and patches not in format_switch(again).names


def test_searchable_honours_its_configuration(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "fp32")
    config = FLIQSConfig(search_space=["int4", "int8"], modules_to_not_convert=["classifier", "*patch_embeddings*"])
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "fp32", quantization_config=config)
    switch = format_switch(model)
    assert len(switch.names) == 12 and not any("classifier" in name or "patch" in name for name in switch.names)
    groups: dict[int | None, list[str]] = {}
    for name, group in zip(switch.names, switch.input_groups, strict=True):
        groups.setdefault(group, []).append(name.rpartition(".")[2])
    shared = [sorted(names) for names in groups.values() if len(names) > 1]
    assert len(shared) == 2 and all(sorted(name[0] for name in names) == ["k", "q", "v"] for names in shared)

    model.save_pretrained(tmp_path / "search")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "search")
    assert format_switch(again).names == switch.names
    assert format_switch(again).input_groups == switch.input_groups
    base = type(model.vit).from_pretrained(tmp_path / "search")  # which has no classifier to leave out
    assert not any("patch" in name for name in format_switch(base).names)
    with pytest.raises(ConfigError, match="'clasifier' matches none"):
        AutoModelForImageClassification.from_pretrained(
            tmp_path / "fp32",
            quantization_config=FLIQSConfig(search_space=["int4"], modules_to_not_convert=["clasifier"]),
        )


@pytest.mark.parametrize("change", [
    {"overrides": {"classifier": "int8"}}, {"weight_format": "int4"}, {"activation_format": "int4"},
    {"activation_format": None},
], ids=str)  # fmt: skip
def test_what_has_no_meaning_beside_a_search_space_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))}=.* contradicts search_space"):
        FLIQSConfig(search_space=["int4", "int8"], **change)


def fingerprint(model: nn.Module) -> list[Any]:
    modules = [
        (name, type(module), module.training, len(module._forward_hooks)) for name, module in model.named_modules()
    ]
    return [modules, {name: value.clone() for name, value in model.state_dict().items()}, sorted(vars(model))]


def four_bits(model: nn.Module) -> Allocation:
    return Allocation.uniform(quantizable_layers(model), "int4")


FAILURES: dict[str, tuple[type[Exception], Callable[[Any], Any]]] = {
    "quantize, unknown layer": (AllocationError, lambda m: quantize(m, Allocation.uniform(["x"], "int4"))),
    "quantize, search space": (ConfigError, lambda m: quantize(m, FLIQSConfig(search_space=["int4"]))),
    "quantize, NaN": (FormatError, lambda m: quantize(m, FLIQSConfig())),
    "calibrate, NaN": (FormatError, lambda m: calibrate(m, four_bits(m), [images()])),
    "calibrate, no images": (DataError, lambda m: calibrate(m, four_bits(m), [])),
    "make_searchable, unknown layer": (AllocationError, lambda m: make_searchable(m, ["int4"], names=["x"])),
    "make_searchable, unknown format": (FormatError, lambda m: make_searchable(m, ["int99"])),
}  # fmt: skip


@pytest.mark.parametrize("searchable", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_changes_nothing(name: str, searchable: bool) -> None:
    model = tiny("vit").train()
    model.vit.eval()
    if name.endswith("NaN"):
        model.vit.layers[1].mlp.fc2.weight.data[0, 0] = torch.nan
    if searchable:
        switch = make_searchable(model, ["int4", "int8"])
        switch.set(torch.ones(14, dtype=torch.long), torch.zeros(14, dtype=torch.long))
    before = fingerprint(model)
    error, change = FAILURES[name]
    if searchable and name.startswith("make_searchable, unknown format"):
        error = ConfigError  # it is searchable already
    with pytest.raises(error):
        change(model)
    after = fingerprint(model)
    assert before[0] == after[0] and before[2] == after[2]
    assert all(
        torch.equal(
            value,
            after[1][key],
        )
        or value.isnan().any()
        for key, value in before[1].items()
    )
    if searchable:
        assert format_switch(model) is switch and switch.enabled


@pytest.mark.parametrize("change", [
    lambda model: quantize(model, FLIQSConfig()),
    lambda model: quantize(model, Allocation.uniform(["0"], "int4")),
    lambda model: calibrate(model, Allocation.uniform(["0"], "int4"), [images()]),
    lambda model: calibrate(model, Allocation.uniform(["0"], "int4"), [], rounding="nearest"),
])  # fmt: skip
def test_a_module_that_is_not_of_transformers_is_refused_unchanged(change: Callable[[Any], Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"a Sequential is no model of Transformers.*pack_model"):
        change(model)
    assert type(model[0]) is nn.Linear and "hf_quantizer" not in vars(model)
