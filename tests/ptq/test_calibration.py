"""`calibrate` on whole models: what each option promises, saving and loading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf import Allocation, FLIQSConfig, LayerFormats, make_searchable, quantize
from fliqs_hf.formats import COMMON, parse
from fliqs_hf.formats.rounding import round_to_format
from fliqs_hf.nn import packed_layers, quantizable_layers
from fliqs_hf.ptq import calibrate
from fliqs_hf.ptq.ranges import FACTORS, clip_factor
from fliqs_hf.quant import IMAGE, quantize_activation
from tests.helpers.calibration import LAYER, STATIC, inputs_of, logits, mixed, uniform
from tests.helpers.models import ARCHITECTURES, images, tiny


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
    dynamic = quantize_activation(x, parse("int8"), IMAGE, "per_tensor")
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


def test_a_bfloat16_model_keeps_its_dtype() -> None:
    model = tiny("vit").to(torch.bfloat16)
    calibrate(model, uniform(model), [images()], activations="percentile")
    assert logits(model).dtype == torch.bfloat16 and logits(model).isfinite().all()
    assert all(layer.input_scale.dtype == torch.float32 for layer in packed_layers(model).values())
