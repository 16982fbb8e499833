"""The loop: schedule, weight decay, states on disk, and what happens when something goes wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

import fliqs_hf.training.state as state_module
from fliqs_hf.errors import CheckpointError, ConfigError, DataError, TrainingError
from fliqs_hf.training import TrainConfig, evaluate, train
from fliqs_hf.training.optimizer import decay_groups
from fliqs_hf.training.state import states
from tests.helpers.models import ARCHITECTURES, tiny


class Blobs(torch.utils.data.Dataset[Any]):
    """Images whose label is the brightest of five stripes: learnable, no files."""

    def __init__(self, count: int, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(count)
        self.labels = torch.randint(5, (count,), generator=generator).tolist()
        self.images = torch.randn(count, 3, 32, 32, generator=generator) * 0.3
        for image, label in zip(self.images, self.labels, strict=True):
            image[:, label * 6 : label * 6 + 6] += 1
        if poison is not None:
            self.images[poison] = math.nan

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **({"max_steps": 12, "batch_size": 8, "learning_rate": 1e-3, "save_steps": 4, "logging_steps": 2} | changes)
    )


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_training_learns_and_evaluation_does_not_depend_on_the_batch(accelerator: Accelerator) -> None:
    model, data = tiny("vit"), Blobs(200)
    before = evaluate(model, data, accelerator)
    train(model, data, config(max_steps=150, batch_size=16), accelerator)
    after = evaluate(model, data, accelerator, batch_size=7)
    assert after.top1 > before.top1 + 0.3  # chance is 0.2, a working loop passes 0.9
    again = evaluate(model, data, accelerator, batch_size=200)
    assert (again.correct, again.correct5, again.n) == (after.correct, after.correct5, 200)
    assert again.correct5 == 200 and math.isclose(
        again.loss, after.loss, rel_tol=1e-5
    )  # float32 sums in another order


METRIC = """
import datasets
import evaluate


class Wrong(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"wrong": sum(p != r for p, r in zip(predictions, references))}
"""


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_not_finite_are_not_counted(accelerator: Accelerator, value: float) -> None:
    """The first NaN would pass for the highest logit: some images would be right."""
    model = tiny("vit")
    model.classifier.bias.data[2] = value
    with pytest.raises(CheckpointError, match="evaluation: the model returns NaN or infinity"):
        evaluate(model, Blobs(7), accelerator, batch_size=3)
    with pytest.raises(DataError, match="holds no image"):
        evaluate(model, Blobs(0), accelerator)


def test_metrics_of_the_evaluate_library(accelerator: Accelerator, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(METRIC)
    result = evaluate(tiny("vit"), Blobs(40), accelerator, metrics=[str(tmp_path / "wrong.py")])
    assert result.metrics == {str(tmp_path / "wrong.py"): 40 - result.correct}
    with pytest.raises(ConfigError, match="no_such_metric"):
        evaluate(tiny("vit"), Blobs(4), accelerator, metrics=["./no_such_metric.py"])


def test_the_learning_rate_is_warmed_up_and_ends_near_zero() -> None:
    c = config(max_steps=100, warmup_ratio=0.1, learning_rate=1.0)
    assert [c.learning_rate_at(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert math.isclose(c.learning_rate_at(55), 0.5) and c.learning_rate_at(99) < 1e-3


def test_weight_decay_spares_vectors_and_embeddings() -> None:
    model = tiny("vit")
    decayed, rest = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for p in decayed["params"]} == {"weight"}
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert {"vit.embeddings.position_embeddings", "vit.embeddings.cls_token"} <= {names[id(p)] for p in rest["params"]}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)


SPARED: dict[str, tuple[Any, Any, set[str]]] = {  # what looks like a matrix: model class, configuration, parameters
    "dinov2_with_registers": (
        hf.Dinov2WithRegistersForImageClassification,
        lambda: hf.Dinov2WithRegistersConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
        ),
        {"register_tokens", "cls_token", "mask_token", "position_embeddings"},
    ),
    "siglip": (*ARCHITECTURES["siglip"], {"probe", "position_embedding.weight"}),
    "swinv2": (
        hf.Swinv2ForImageClassification,
        lambda: hf.Swinv2Config(
            image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        {"logit_scale"},
    ),
    "convnextv2": (
        hf.ConvNextV2ForImageClassification,
        lambda: hf.ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
        {"grn.weight", "grn.bias"},
    ),
    "levit": (
        hf.LevitForImageClassification,
        lambda: hf.LevitConfig(
            image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        {"attention_biases"},
    ),
    "swiftformer": (
        hf.SwiftFormerForImageClassification,
        lambda: hf.SwiftFormerConfig(image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 8, 8, 8]),
        {"layer_scale", "layer_scale_1", "layer_scale_2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", SPARED)
def test_weight_decay_spares_what_only_looks_like_a_matrix(architecture: str) -> None:
    cls, configuration, wanted = SPARED[architecture]
    model = cls(configuration())
    decayed, rest = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    spared = {names[id(p)] for p in rest["params"] if p.dim() >= 2}
    for end in wanted:
        assert any(name.endswith(end) for name in spared), end
    assert all(name.endswith(tuple(wanted)) for name in spared)
    modules = dict(model.named_modules())
    kinds = {type(modules[name.rpartition(".")[0]]) for name in spared}
    assert not kinds & {nn.Linear, nn.Conv2d}  # matrices and kernels are not spared


class StopError(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_log(entry: dict[str, Any]) -> None:
        if entry["step"] == step:
            raise StopError

    return on_log


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_accumulation_steps": 2}, {"label_smoothing": 0.1}, {"ema_decay": 0.9}], ids=str
)
def test_a_run_that_dies_resumes_to_the_same_bits(
    accelerator: Accelerator, tmp_path: Path, changes: dict[str, Any]
) -> None:
    data = Blobs(50)
    whole = weights(train(tiny("vit"), data, config(**changes), accelerator))
    with pytest.raises(StopError):
        train(tiny("vit"), data, config(**changes), accelerator, state_folder=tmp_path, on_log=stop_at(10))
    assert [path.name for path in states(tmp_path)] == ["step-00000008"]
    resumed = train(tiny("vit", seed=5), data, config(**changes), accelerator, state_folder=tmp_path, resume=True)
    assert same(weights(resumed), whole)


def test_the_average_is_returned_and_differs(accelerator: Accelerator) -> None:
    """A decay of 0 is none; one step's average is the tenth of the way that (1 + t) / (10 + t) leaves."""
    start = weights(tiny("vit"))
    plain = weights(train(tiny("vit"), Blobs(50), config(max_steps=1), accelerator))
    averaged = weights(train(tiny("vit"), Blobs(50), config(max_steps=1, ema_decay=0.9), accelerator))
    for name, tensor in averaged.items():
        assert torch.allclose(tensor, 0.1 * start[name] + 0.9 * plain[name], atol=1e-6), name  # float32 rounding


class Peak:
    """A score that is highest at one step, and the weights that it saw there."""

    def __init__(self, steps: list[int], peak: int) -> None:
        self.steps, self.peak, self.seen = iter(steps), peak, {}  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module) -> float:
        step = next(self.steps)
        self.seen[step] = weights(model)
        return -abs(step - self.peak) / 10


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.9}], ids=str)
def test_the_best_weights_are_returned(accelerator: Accelerator, tmp_path: Path, changes: dict[str, Any]) -> None:
    score, entries = Peak([3, 6, 9, 12], 6), []
    settings = config(eval_steps=3, keep_best=True, **changes)
    model = train(
        tiny("vit"), Blobs(50), settings, accelerator, score=score, state_folder=tmp_path, on_log=entries.append
    )
    assert same(weights(model), score.seen[6]) and not same(weights(model), score.seen[12])
    assert [entry["score"] for entry in entries if "score" in entry] == [-0.3, 0, -0.3, -0.6]


def test_the_best_weights_survive_a_crash(accelerator: Accelerator, tmp_path: Path) -> None:
    """The best comes after the last state and before the crash: it is found again and kept."""
    settings = config(eval_steps=3, keep_best=True)
    whole = Peak([3, 6, 9, 12], 9)
    model = train(tiny("vit"), Blobs(50), settings, accelerator, score=whole, state_folder=tmp_path / "whole")
    with pytest.raises(StopError):
        train(
            tiny("vit"), Blobs(50), settings, accelerator, score=Peak([3, 6, 9], 9), state_folder=tmp_path / "crash",
            on_log=stop_at(10),
        )  # fmt: skip
    resumed = train(
        tiny("vit", seed=5), Blobs(50), settings, accelerator, score=Peak([9, 12], 9),
        state_folder=tmp_path / "crash", resume=True,
    )  # fmt: skip
    assert same(weights(resumed), weights(model))
    again = Peak([3, 6, 9, 12], 3)  # another run in the same folder does not inherit a best
    fresh = train(tiny("vit"), Blobs(50), settings, accelerator, score=again, state_folder=tmp_path / "crash")
    assert same(weights(fresh), again.seen[3])


def test_a_gradient_that_is_not_finite_spoils_no_state(accelerator: Accelerator, tmp_path: Path) -> None:
    """The loss of the step before a state is finite, its gradient is not: the weights are lost, the state is not."""
    model = tiny("vit")
    calls = []

    def poison(grad: torch.Tensor) -> torch.Tensor:
        calls.append(None)
        return grad * math.nan if len(calls) == 8 else grad

    model.classifier.weight.register_hook(poison)
    with pytest.raises(TrainingError, match=r"grad_norm was not finite.*step-00000004"):
        train(model, Blobs(50), config(logging_steps=100), accelerator, state_folder=tmp_path)
    assert [path.name for path in states(tmp_path)] == ["step-00000004"]
    assert all(tensor.isfinite().all() for tensor in load_file(states(tmp_path)[-1] / "model.safetensors").values())


def test_a_second_run_in_a_folder_replaces_the_states_of_the_first(accelerator: Accelerator, tmp_path: Path) -> None:
    for learning_rate in (1e-3, 1e-4):
        settings = config(learning_rate=learning_rate)
        train(tiny("vit"), Blobs(50), settings, accelerator, state_folder=tmp_path)
    assert f"learning_rate={1e-4!r}" in (states(tmp_path)[-1] / "meta.json").read_text()


def test_two_micro_batches_are_one_batch(accelerator: Accelerator) -> None:
    data = Blobs(64)
    one = train(tiny("vit"), data, config(max_steps=4, batch_size=16), accelerator)
    two = train(tiny("vit"), data, config(max_steps=4, batch_size=8, gradient_accumulation_steps=2), accelerator)
    for name, tensor in one.state_dict().items():
        # the same mean gradient up to the order of float32 sums, which Adam's division can amplify to the step size
        assert torch.allclose(tensor, two.state_dict()[name], atol=2e-3), name


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(accelerator: Accelerator, tmp_path: Path) -> None:
    healthy = Blobs(64)
    with pytest.raises(StopError):
        train(tiny("vit"), healthy, config(), accelerator, state_folder=tmp_path, on_log=stop_at(6))
    saved = (states(tmp_path)[-1] / "model.safetensors").read_bytes()
    poisoned = Blobs(64)
    poisoned.images[:] = math.nan
    with pytest.raises(TrainingError, match=r"not finite.*learning_rate=0\.001.*step-00000004"):
        train(tiny("vit"), poisoned, config(), accelerator, state_folder=tmp_path, resume=True)
    assert (states(tmp_path)[-1] / "model.safetensors").read_bytes() == saved
    assert all(tensor.isfinite().all() for tensor in load_file(states(tmp_path)[-1] / "model.safetensors").values())


def test_a_full_disk_keeps_the_last_state(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = Blobs(50), []
    original = state_module.save_file

    def save_file(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 4:  # three files make a state: the second state fails in its second file
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(state_module, "save_file", save_file)
    with pytest.raises(TrainingError, match=r"step-00000008: .*No space left"):
        train(tiny("vit"), data, config(), accelerator, state_folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    resumed = train(tiny("vit", seed=5), data, config(), accelerator, state_folder=tmp_path, resume=True)
    assert same(weights(resumed), weights(train(tiny("vit"), data, config(), accelerator)))


def test_a_state_of_other_settings_or_a_damaged_one_is_refused(accelerator: Accelerator, tmp_path: Path) -> None:
    data = Blobs(50)
    with pytest.raises(StopError):
        train(tiny("vit"), data, config(), accelerator, state_folder=tmp_path, on_log=stop_at(6))
    with pytest.raises(CheckpointError, match="config="):
        train(tiny("vit"), data, config(learning_rate=1e-4), accelerator, state_folder=tmp_path, resume=True)
    file = states(tmp_path)[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(tiny("vit"), data, config(), accelerator, state_folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_steps": 0}, "max_steps=0"),
        ({"label_smoothing": 2}, "label_smoothing=2"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"ema_decay": 1}, "ema_decay=1"),
        ({"keep_best": True}, "eval_steps"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**changes)


class TwoPasses:
    """Says which pass is running, and keeps the qualities. Implements `StepHook`."""

    def __init__(self, passes: int) -> None:
        self.passes, self.running = passes, -1
        self.qualities: list[torch.Tensor] = []

    def begin_step(self, step: int) -> list[Any]:
        def setter(number: int) -> Any:
            return lambda: setattr(self, "running", number)

        return [setter(number) for number in range(self.passes)]

    def end_step(self, step: int, quality: torch.Tensor) -> dict[str, torch.Tensor]:
        self.qualities.append(quality)
        return {}

    def settled(self, step: int) -> bool:
        return False

    def log(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


@pytest.mark.parametrize("micro", [1, 2])
def test_further_passes_of_a_step_are_measured_and_not_trained_with(accelerator: Accelerator, micro: int) -> None:
    """Weights end as with one pass; each pass has its quality; no gradient is kept for a pass that has none."""
    ends, hooks, grad_modes = [], [], []
    for passes in (1, 3):
        model, hook = tiny("vit"), TwoPasses(passes)
        modes: list[tuple[int, bool]] = []
        model.classifier.register_forward_hook(
            lambda *_, modes=modes, hook=hook: modes.append((hook.running, torch.is_grad_enabled()))
        )
        train(model, Blobs(40), config(max_steps=2, gradient_accumulation_steps=micro), accelerator, hook=hook)
        ends.append(weights(model))
        hooks.append(hook)
        grad_modes.append(modes)
    assert same(*ends)
    assert grad_modes[1] == [(0, True), (1, False), (2, False)] * micro * 2
    for one, three in zip(hooks[0].qualities, hooks[1].qualities, strict=True):
        assert torch.equal(three, one.expand(3))  # here all passes compute the same
