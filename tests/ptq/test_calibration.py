"""`calibrate` on whole models: what each option promises, saving and loading, and bad input."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, LayerFormats, make_searchable, quantize
from fliqs_hf.errors import AllocationError, CheckpointError, ConfigError, DataError
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.formats.rounding import round_to_format
from fliqs_hf.nn import packed_layers, quantizable_layers
from fliqs_hf.ptq import calibrate
from fliqs_hf.ptq.ranges import FACTORS, clip_factor
from fliqs_hf.quant import quantize_activation
from tests.models import ARCHITECTURES, images, tiny

LAYER = "vit.layers.0.mlp.fc1"
STATIC = ("absmax", "percentile", "mse")


def uniform(model: nn.Module, fmt: str = "int4") -> Allocation:
    return Allocation.uniform(quantizable_layers(model), fmt)


def mixed(model: nn.Module) -> Allocation:
    """Every common format in turn, weights and activations apart, one layer weight-only."""
    weights, activations = itertools.cycle(COMMON), itertools.cycle([*reversed(COMMON), None])
    return Allocation({name: LayerFormats(next(weights), next(activations)) for name in quantizable_layers(model)})


@torch.no_grad()
def logits(model: Any, x: Tensor | None = None) -> Tensor:
    return model(images() if x is None else x).logits


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each quantizable layer of a plain model reads."""
    seen: dict[str, Tensor] = {}
    for name, layer in quantizable_layers(model).items():
        layer.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].detach()}))
    logits(model, x)
    return seen


@pytest.mark.parametrize("activations", ["dynamic", "clipped", *STATIC])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_and_loaded_models_are_bit_identical(architecture: str, activations: Any, tmp_path: Path) -> None:
    model = tiny(architecture)
    allocation = mixed(model)
    result = calibrate(model, allocation, images(8).split(3), activations=activations)
    assert result is model and not model.training
    expected = logits(model)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again), expected)
    config = again.config.quantization_config
    assert config.allocation == allocation
    granularities = {"dynamic": "per_token", "clipped": "per_token_clipped"}
    assert config.activation_granularity == granularities.get(activations, "static")
    for name, layer in packed_layers(again).items():
        fmt = allocation[name].activation
        assert (layer.input_scale is not None) == (activations != "dynamic" and fmt is not None and fmt.is_scaled)


@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_no_option_is_quantize(method: Any) -> None:
    model = tiny("vit")
    expected = quantize(copy.deepcopy(model), FLIQSConfig(allocation=mixed(model), weight_scale=method))
    options: Any = {"rounding": "nearest", "weight_scale": method}
    calibrate(model, mixed(model), iter(()), **options)
    assert torch.equal(logits(model), logits(expected))
    assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()


def test_searchable_models_are_calibrated_as_plain_ones() -> None:
    model = tiny("deit")
    searchable = copy.deepcopy(model)
    make_searchable(searchable, COMMON)
    for m in (model, searchable):
        calibrate(m, uniform(m), [images()])
    assert torch.equal(logits(model), logits(searchable))


def test_batches_do_not_matter_and_are_read_once() -> None:
    results = []
    for batches in (iter(images(8).split(3)), [images(8)]):
        model = calibrate(tiny("vit"), uniform(tiny("vit")), batches, rounding="gptq", activations="mse")
        results.append(logits(model))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)  # the fp32 means are sums in another order


@pytest.mark.parametrize("architecture", ["vit", "resnet"])
def test_bias_correction_restores_the_mean_of_every_channel(architecture: str) -> None:
    """Of one quantized layer, on the calibration images; and the layers before it are as they were."""
    plain = tiny(architecture)
    x = images(16)
    name = {"vit": "classifier", "resnet": "classifier.1"}[architecture]
    only = Allocation({name: LayerFormats.of("int2", "int2")})
    for rounding in ("nearest", "gptq"):
        options: Any = {"rounding": rounding, "weight_scale": "absmax"}
        without, corrected = (
            calibrate(tiny(architecture), only, x.split(5), bias_correction=value, **options)
            for value in (False, True)
        )
        expected = logits(plain, x).double().mean(0)
        # float32: a logit here is a sum of up to 48 products near 1, averaged over 16 images
        torch.testing.assert_close(logits(corrected, x).double().mean(0), expected, rtol=0, atol=1e-6)
        assert (logits(without, x).double().mean(0) - expected).abs().max() > 1e-2
        assert torch.equal(packed_layers(corrected)[name].weight_codes, packed_layers(without)[name].weight_codes)


def test_bias_correction_covers_what_earlier_layers_do() -> None:
    """The last layer's mean is that of fp32 although every layer before it is quantized."""
    x = images(16)
    corrected = calibrate(tiny("vit"), uniform(tiny("vit"), "int3"), [x], bias_correction=True)
    expected = logits(tiny("vit"), x).mean(0)
    torch.testing.assert_close(logits(corrected, x).mean(0), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("activations", "corrected"), [("dynamic", False), ("absmax", True)])
def test_bias_correction_is_on_where_input_scales_are_fixed(activations: Any, corrected: bool) -> None:
    options: Any = {"activations": activations, "rounding": "nearest"}
    default = calibrate(tiny("vit"), uniform(tiny("vit")), [images()], **options)
    said = calibrate(tiny("vit"), uniform(tiny("vit")), [images()], bias_correction=corrected, **options)
    other = calibrate(tiny("vit"), uniform(tiny("vit")), [images()], bias_correction=not corrected, **options)
    assert torch.equal(logits(default), logits(said)) and not torch.equal(logits(default), logits(other))


def test_layers_without_bias_get_none() -> None:
    model = tiny("resnet")
    before = {name: layer.bias is None for name, layer in quantizable_layers(model).items()}
    assert any(before.values())
    calibrate(model, uniform(model), [images()], bias_correction=True)
    assert {name: layer.bias is None for name, layer in packed_layers(model).items()} == before


@pytest.mark.parametrize("architecture", ["resnet", "mobilenet_v2", "efficientnet"])
def test_means_behind_convolutions_without_bias_are_corrected_in_their_norms(architecture: str) -> None:
    x = images(16)

    def means(model: Any) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for name, norm in norms.items():
            norm.register_forward_hook(lambda _, __, y, name=name: found.update({name: y.mean((0, 2, 3))}))
        logits(model, x)
        return found

    expected = means(tiny(architecture))
    nearest, corrected = (
        means(calibrate(tiny(architecture), uniform(tiny(architecture), "int3"), [x], bias_correction=wanted))
        for wanted in (False, True)
    )
    assert expected and expected.keys() == corrected.keys()
    for name, mean in expected.items():
        size = 1 + mean.abs().max()
        # Sums in float32, and a running mean that is rounded to it.
        torch.testing.assert_close(corrected[name] / size, mean / size, rtol=0, atol=1e-5)
    assert any(not torch.allclose(nearest[name], mean, atol=1e-2) for name, mean in expected.items())


def test_the_original_bias_is_not_changed_in_place() -> None:
    model = tiny("vit")
    bias = model.classifier.bias
    before = bias.detach().clone()
    calibrate(model, uniform(model), [images()], bias_correction=True)
    assert torch.equal(bias, before) and not torch.equal(model.classifier.bias, before)


def test_gptq_brings_a_layer_closer_to_its_output() -> None:
    """One layer quantized: the layers before it give what they gave, so its output errors compare."""
    plain, x = tiny("vit"), images(32)
    seen = inputs_of(tiny("vit"), x)[LAYER]
    only = Allocation({LAYER: LayerFormats.of("int3", None)})
    errors = {}
    for rounding in ("nearest", "gptq"):
        options: Any = {"rounding": rounding}
        weight = packed_layers(calibrate(tiny("vit"), only, [x], **options))[LAYER].decoded_weight()
        original = plain.get_submodule(LAYER).weight.detach()
        errors[rounding] = float(((weight - original) @ seen.flatten(0, 1).T).square().sum())
    assert errors["gptq"] < 0.7 * errors["nearest"]


def test_gptq_reads_what_the_quantized_layers_before_give() -> None:
    """The last layer's weight depends on the formats of the layers before it."""
    scores = []
    for first in ("int8", "int2"):
        model = tiny("vit")
        names = list(quantizable_layers(model))
        formats = {name: LayerFormats.of(first if name != names[-1] else "int3", None) for name in names}
        calibrate(model, Allocation(formats), [images(16)])
        scores.append(packed_layers(model)[names[-1]].weight_codes)
    assert not torch.equal(*scores)


@pytest.mark.parametrize("activations", STATIC)
def test_static_inputs_do_not_depend_on_themselves(activations: Any) -> None:
    """The grid is the same for every input, and what lies beyond it saturates."""
    model = calibrate(tiny("vit"), uniform(tiny("vit"), "int4"), [images(8)], activations=activations)
    layer = packed_layers(model)[LAYER]
    scale = layer.input_scale
    x = torch.tensor([1e6, -1e6, 0.0, 3.2]) * scale
    quantized = layer.quantized_input(x)
    assert torch.equal(quantized, torch.tensor([7.0, -7.0, 0.0, 3.0]) * scale)
    assert torch.equal(layer.quantized_input(x[3:]), quantized[3:])


def test_absmax_scale_is_that_of_all_calibration_images() -> None:
    model, x = tiny("vit"), images(8)
    seen = inputs_of(tiny("vit"), x)
    first = next(iter(seen))
    options: Any = {"rounding": "nearest", "activations": "absmax"}
    calibrate(model, uniform(model, "int8"), x.split(3), **options)
    layer = packed_layers(model)[first]
    assert torch.equal(layer.input_scale, (seen[first].abs().max() / 127).reshape(1))
    dynamic = quantize_activation(x, parse("int8"), "conv2d", "per_tensor")
    assert torch.equal(layer.quantized_input(x), dynamic)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("name", ["int3", "e2m1"])
def test_the_clipping_factor_is_the_best_one(kind: str, name: str) -> None:
    """Against the layer run with every factor; outliers that its weights ignore should cost nothing."""
    torch.manual_seed(0)
    fmt, x = parse(name), torch.randn(40, 24) if kind == "linear" else torch.randn(40, 3, 8, 8)
    x[:, 0] *= 10
    layer = nn.Linear(24, 5) if kind == "linear" else nn.Conv2d(3, 5, 3, stride=2)
    with torch.no_grad():
        layer.weight[:, 0] = 0
        peak = x.abs().amax(-1 if kind == "linear" else (1, 2, 3), keepdim=True)

        def error(factor: float) -> float:
            scale = factor * peak / fmt.max_value
            rounded = round_to_format((x / scale).clamp(-fmt.max_value, fmt.max_value), fmt) * scale
            return float((layer(rounded) - layer(x)).square().sum())

        best = min(FACTORS, key=error)
        assert best < 1
        assert clip_factor(x, layer, fmt).item() == pytest.approx(best)


def test_a_factor_leaves_a_token_independent_of_its_batch() -> None:
    """Twice the input is twice the output of the quantizer, and what lies beyond the factor saturates."""
    model = calibrate(tiny("vit"), uniform(tiny("vit"), "int3"), [images(8)], activations="clipped")
    layer = packed_layers(model)[LAYER]
    assert 0 < layer.input_scale < 1
    x = torch.randn(5, layer.in_features)
    quantized = layer.quantized_input(x)
    assert torch.equal(layer.quantized_input(2 * x), 2 * quantized)
    assert torch.equal(layer.quantized_input(x[2:3]), quantized[2:3])
    torch.testing.assert_close(quantized.abs().amax(1), x.abs().amax(1) * layer.input_scale)


def test_scales_stay_float32() -> None:
    model = calibrate(tiny("vit"), uniform(tiny("vit")), [images()], activations="absmax")
    before = {name: layer.input_scale.clone() for name, layer in packed_layers(model).items()}
    model.to(torch.bfloat16)
    for name, layer in packed_layers(model).items():
        assert layer.input_scale.dtype == layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.input_scale, before[name])
    assert model(images().bfloat16()).logits.isfinite().all()


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


def test_a_bfloat16_model_keeps_its_dtype() -> None:
    model = tiny("vit").to(torch.bfloat16)
    calibrate(model, uniform(model), [images()], activations="percentile")
    assert logits(model).dtype == torch.bfloat16 and logits(model).isfinite().all()
    assert all(layer.input_scale.dtype == torch.float32 for layer in packed_layers(model).values())
