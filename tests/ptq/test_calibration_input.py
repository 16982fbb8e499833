"""Bad and extreme input of `calibrate`, and damaged records of what it found: named, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, LayerFormats, quantize
from fliqs_hf.errors import AllocationError, CheckpointError, ConfigError, DataError
from fliqs_hf.nn import packed_layers
from fliqs_hf.ptq import calibrate
from tests.helpers.calibration import LAYER, STATIC, logits, uniform
from tests.helpers.models import images, tiny


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda t: t.pop(f"{LAYER}.input_scale"), id="missing"),
        pytest.param(lambda t: t[f"{LAYER}.input_scale"].zero_(), id="zero"),
        pytest.param(lambda t: t[f"{LAYER}.input_scale"].neg_(), id="negative"),
        pytest.param(lambda t: t[f"{LAYER}.input_scale"].fill_(float("nan")), id="NaN"),
        pytest.param(lambda t: t[f"{LAYER}.input_scale"].fill_(float("inf")), id="infinite"),
        pytest.param(lambda t: t.update({f"{LAYER}.input_scale": torch.ones(2)}), id="shape"),
        pytest.param(lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1).half()}), id="half"),
    ],
)
def test_damaged_input_scales_are_refused(tmp_path: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    model = tiny("vit")
    calibrate(model, uniform(model), [images()], activations="absmax").save_pretrained(tmp_path)
    edit_tensors(tmp_path, edit)
    with pytest.raises(CheckpointError, match=f"{LAYER}.input_scale"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_a_surplus_input_scale_is_refused(tmp_path: Path) -> None:
    model = tiny("vit")
    calibrate(model, uniform(model), [images()], activations="absmax").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["activation_granularity"] = "per_token"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="input_scale"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


def test_static_without_calibration_is_refused(tmp_path: Path) -> None:
    model = tiny("vit")
    with pytest.raises(ConfigError, match=r"fliqs_hf\.ptq\.calibrate"):
        FLIQSConfig(activation_granularity="static")
    with pytest.raises(ConfigError, match=r"fliqs_hf\.ptq\.calibrate"):
        FLIQSConfig(search_space="mixed", activation_granularity="static")
    config = FLIQSConfig(allocation=uniform(model), activation_granularity="static")
    with pytest.raises(ConfigError, match=r"fliqs_hf\.ptq\.calibrate"):
        quantize(model, config)
    assert not packed_layers(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"fliqs_hf\.ptq\.calibrate"):
        AutoModelForImageClassification.from_pretrained(tmp_path, quantization_config=config)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"rounding": "up"}, ConfigError, "rounding='up'"),
        ({"activations": "static"}, ConfigError, "activations='static'"),
        ({"activations": "percentile", "percentile": 0}, ConfigError, "percentile=0"),
        ({"percentile": 100.5}, ConfigError, r"percentile=100\.5"),
        ({"damping": 0.0}, ConfigError, r"damping=0\.0"),
        ({"damping": "0.1"}, ConfigError, r"damping='0\.1'"),
        ({"percentile": None}, ConfigError, "percentile=None"),
        ({"activations": ["mse"]}, ConfigError, r"activations=\['mse'\]"),
        ({"bias_correction": "no"}, ConfigError, "bias_correction='no'"),
        ({"batches": 5}, DataError, "batches=5"),
        ({"weight_scale": "max"}, ValueError, "weight_scale='max'"),
        ({"weight_scale": "output", "rounding": "nearest"}, ConfigError, "take 'mse'"),
        ({"allocation": {"vit.layers.9": {"weight": "int4", "activation": None}}}, AllocationError, r"layers\.9"),
        ({"batches": []}, DataError, "empty"),
        ({"batches": [images().long()]}, DataError, r"batch 0 is torch\.int64"),
        ({"batches": [images()[0]]}, DataError, r"batch 0 is torch\.float32 \[3, 32, 32\]"),
        ({"batches": [{"pixel_values": images()}]}, DataError, "batch 0 is dict"),
        ({"batches": [images(), images(0)]}, DataError, "batch 1"),
        ({"batches": [images(), torch.zeros(2, 3, 16, 16)]}, DataError, "of one size"),
        ({"batches": [images(), images() / 0]}, DataError, "batch 1 holds NaN or infinity"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(options: dict[str, Any], error: type[Exception], named: str) -> None:
    model = tiny("vit")
    arguments: dict[str, Any] = {"allocation": uniform(model), "batches": [images()], **options}
    with pytest.raises(error, match=named):
        calibrate(model, **arguments)
    assert torch.equal(logits(model), logits(tiny("vit")))
    assert all(not layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("activations", ["dynamic", "clipped", *STATIC])
@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e-42, 0.0, 1e20, 1e30])
def test_images_of_any_size(size: float, activations: Any, caplog: pytest.LogCaptureFixture) -> None:
    """From all zeros up: a grid is found, and no layer is given up."""
    x = images(8) * size
    model = calibrate(tiny("resnet"), uniform(tiny("resnet")), [x], activations=activations)
    assert logits(model, x).isfinite().all()
    assert not caplog.records


def test_a_layer_whose_input_overflows_is_named() -> None:
    """LayerNorm squares 1e20, in the fp32 model too."""
    with pytest.raises(DataError, match=r"input of 'vit\.layers\.0\.attention\.q_proj' holds NaN or infinity"):
        calibrate(tiny("vit"), uniform(tiny("vit")), [images() * 1e20])


@pytest.mark.parametrize("size", [2.0**-73, 2.0**66])
def test_gptq_gives_the_same_codes_for_images_of_any_size(size: float) -> None:
    only = Allocation({"vit.embeddings.patch_embeddings.projection": LayerFormats.of("int3", "int8")})
    codes = [
        next(iter(packed_layers(calibrate(tiny("vit"), only, [images(8) * factor])).values())).weight_codes
        for factor in (1.0, size)
    ]
    assert torch.equal(*codes)


def test_images_that_are_all_alike_or_have_a_dead_channel() -> None:
    for x in (torch.full((8, 3, 32, 32), 0.7), images(8) * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1)):
        assert logits(calibrate(tiny("resnet"), uniform(tiny("resnet")), [x]), x).isfinite().all()


def test_a_layer_that_gptq_cannot_solve_is_rounded_to_nearest(caplog: pytest.LogCaptureFixture) -> None:
    """Constant images and next to no damping: the Hessian of the first layer has no inverse, the others have."""
    x = torch.full((8, 3, 32, 32), 0.7)
    options: Any = {"weight_scale": "absmax", "damping": 1e-17}
    name = "vit.embeddings.patch_embeddings.projection"
    model = calibrate(tiny("vit"), uniform(tiny("vit")), [x], **options)
    assert any(record.getMessage().startswith(f"{name} is rounded to nearest") for record in caplog.records)
    assert all("raise it" in record.getMessage() for record in caplog.records)
    nearest = quantize(tiny("vit"), uniform(tiny("vit")))
    assert torch.equal(packed_layers(model)[name].weight_codes, packed_layers(nearest)[name].weight_codes)
    assert packed_layers(model).keys() == packed_layers(nearest).keys()
    assert logits(model, x).isfinite().all()


def test_packed_models_are_refused() -> None:
    model = quantize(tiny("vit"), FLIQSConfig())
    with pytest.raises(ConfigError, match="packed already"):
        calibrate(model, uniform(tiny("vit")), [images()])


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = tiny("vit")
    model.get_submodule(LAYER).weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        calibrate(model, uniform(model), [images()])
    assert not packed_layers(model)


def test_a_layer_that_is_called_twice_is_named() -> None:
    model = tiny("vit")
    forward = model.vit.forward
    model.vit.forward = lambda *args, **kwargs: (forward(*args, **kwargs), forward(*args, **kwargs))[1]
    with pytest.raises(DataError, match=r"more than once.*leave it out"):
        calibrate(model, uniform(model), [images()])


def test_layers_that_no_image_reaches() -> None:
    model = tiny("vit")
    model.unused = nn.Linear(4, 4)
    allocation = uniform(model)
    with pytest.raises(DataError, match=r"'unused'.*leave it out"):
        calibrate(model, allocation, [images()], activations="absmax")
    calibrate(model, allocation, [images()])
    assert "unused" in packed_layers(model)
