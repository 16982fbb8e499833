"""`rotate`: which models it finds its way in, that answers stay, and that failures leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fliqs_hf import Allocation, FLIQSConfig, make_searchable, quantize
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.ptq import calibrate, rotate
from fliqs_hf.ptq.rotation import keeping_ones, orthogonal
from tests.helpers.calibration import logits
from tests.helpers.models import ARCHITECTURES, images, tiny

ROTATED = ("vit", "deit", "deit-distilled", "dinov2")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("size", [2, 3, 16, 192])
def test_matrices_are_orthogonal(size: int) -> None:
    for matrix in (orthogonal(size, 1), keeping_ones(size, 1)):
        identity = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, identity, rtol=0, atol=1e-12)  # float64 of `size` terms
        assert not torch.equal(matrix, identity)
    ones = torch.ones(size, dtype=torch.float64)
    torch.testing.assert_close(keeping_ones(size, 1) @ ones, ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_stay_and_what_is_not_understood_is_left_alone(architecture: str) -> None:
    model, before = tiny(architecture), state_of(tiny(architecture))
    expected = logits(model)
    result = rotate(model, images())
    assert result.keys() == {"residual stream", "attention values"}
    if architecture in ROTATED:
        assert set(result.values()) == {""}
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert len(changed) > len(before) / 2
        # Logits of about 1 from sums in float32: 1e-5 is a hundred roundings.
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    else:
        assert all(result.values())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_channels_that_stand_out_do_so_no_longer() -> None:
    model = tiny("vit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter[3] = 50
    peaks = []
    for _ in range(2):
        seen: list[Tensor] = []
        handle = model.vit.layers[1].mlp.fc1.register_forward_hook(lambda layer, x, y, seen=seen: seen.append(x[0]))
        logits(model)
        handle.remove()
        channels = seen[0].flatten(0, 1).square().mean(0)
        peaks.append(float(channels.max() / channels.mean()))
        rotate(model, images())
    assert peaks[1] < peaks[0] / 4


def test_the_result_is_packed_saved_and_loaded_like_any_model(tmp_path: Path) -> None:
    model = tiny("deit")
    rotate(model, images())
    calibrate(model, Allocation.uniform(quantizable_layers(model), "int4"), [images(8)])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), expected)


def test_a_wrong_guess_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that is not found: what it adds is not turned."""
    import fliqs_hf.ptq.rotation as module

    def without_one(*args: Any, found: Any = module._find) -> Any:
        stream = found(*args)
        del stream.writers[-1], stream.values[-1:]
        return stream

    monkeypatch.setattr(module, "_find", without_one)
    model, before = tiny("vit"), state_of(tiny("vit"))
    result = rotate(model, images())
    assert "would change" in result["residual stream"] and not result["attention values"]
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert torch.equal(model.state_dict()[name], before[name])


def test_an_interruption_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    import fliqs_hf.ptq.rotation as module

    answers = []

    def interrupted(model: Any, x: Tensor, found: Any = module._answer) -> Tensor:
        answers.append(found(model, x))
        if len(answers) > 1:
            raise KeyboardInterrupt
        return answers[0]

    monkeypatch.setattr(module, "_answer", interrupted)
    model, before = tiny("vit"), state_of(tiny("vit"))
    with pytest.raises(KeyboardInterrupt):
        rotate(model, images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_stays_as_it_is() -> None:
    model = tiny("vit").to(torch.bfloat16)
    assert all("float32" in reason for reason in rotate(model, images().to(torch.bfloat16)).values())


def test_packed_and_searchable_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="packed already"):
        rotate(quantize(tiny("vit"), FLIQSConfig()), images())
    model = tiny("vit")
    make_searchable(model, ["int4", "int8"])
    with pytest.raises(ConfigError, match="before make_searchable"):
        rotate(model, images())


def test_training_mode_comes_back() -> None:
    model = tiny("vit").train()
    rotate(model, images())
    assert model.training
