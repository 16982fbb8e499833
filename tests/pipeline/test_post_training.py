"""Formats are chosen for the model as it will be quantized."""

from __future__ import annotations

from typing import Any

import torch

from fliqs_hf.cost import Target
from fliqs_hf.nn import QuantizerSettings, quantizable_layers
from fliqs_hf.pipeline.post_training import GAIN_IMAGES, AllocationResult, allocate
from fliqs_hf.ptq import rounding_gain
from fliqs_hf.quant import WeightQuantizer
from fliqs_hf.selection import fisher_scores
from tests.helpers.models import images, tiny

MSE = QuantizerSettings(weight_scale="mse")
LABELS = torch.arange(GAIN_IMAGES + 2) % 5
IMAGES = images(len(LABELS))


def found(**options: Any) -> AllocationResult:
    options = {"search_space": "int2,int4,int8", "activation": "separate", "settings": MSE} | options
    return allocate(tiny("vit"), lambda: [(IMAGES, LABELS)], Target.of(target_bits=4), **options)


def test_scores_of_weights_are_those_of_nearest_rounding_times_the_gain() -> None:
    model = tiny("vit")
    gain = rounding_gain(
        model, quantizable_layers(model), IMAGES[:GAIN_IMAGES], quantizer=WeightQuantizer(method="mse")
    )
    result = found(rounding="gptq")
    space, scores = result.space, result.sensitivity.decision_scores
    plain = fisher_scores(model, [(IMAGES, LABELS)], lambda x: model(x).logits, space, MSE).decision_scores
    torch.testing.assert_close(found().sensitivity.decision_scores, plain, rtol=0, atol=0)
    for layer, weights, inputs in zip(space.layers, space.weight_decision, space.activation_decision, strict=True):
        assert 0 < gain[layer.name] < 1
        torch.testing.assert_close(scores[weights], plain[weights] * gain[layer.name], rtol=1e-6, atol=0)
        assert torch.equal(scores[inputs], plain[inputs])


def test_tied_layers_share_the_mean_of_their_gains() -> None:
    tie = ["*attention.q_proj", "*attention.k_proj"]
    model = tiny("vit")
    gain = rounding_gain(model, quantizable_layers(model), IMAGES[:GAIN_IMAGES])
    result, plain = found(rounding="gptq", tie=tie), found(tie=tie)
    decision = next(
        d for d in result.space.weight_decision.tolist() if result.space.weight_decision.tolist().count(d) > 1
    )
    layers = [
        one.name for one, d in zip(result.space.layers, result.space.weight_decision, strict=True) if d == decision
    ]
    expected = plain.sensitivity.decision_scores[decision] * (sum(gain[name] for name in layers) / len(layers))
    torch.testing.assert_close(result.sensitivity.decision_scores[decision], expected, rtol=1e-6, atol=0)


def test_where_weight_and_input_share_a_format_their_score_stays() -> None:
    scores = [
        found(activation="same", rounding=rounding).sensitivity.decision_scores for rounding in ("nearest", "gptq")
    ]
    assert torch.equal(*scores)


def test_few_images_are_enough() -> None:
    few = [(IMAGES[:3], LABELS[:3])]
    assert allocate(
        tiny("vit"), lambda: few, Target.of(target_bits=4), rounding="gptq", search_space="int4"
    ).allocation
