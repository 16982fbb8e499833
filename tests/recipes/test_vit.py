"""The recipe, end to end on a few digits: run folder, interruption, errors."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForImageClassification, ViTForImageClassification

import fliqs_hf
from fliqs_hf.cost import LayerInfo, bops, hardware
from fliqs_hf.errors import CheckpointError, ConfigError, FliqsError, HubError, TargetError, TrainingError
from fliqs_hf.nn import packed_layers
from fliqs_hf.pipeline import finetuning
from fliqs_hf.pipeline import job as recipe_job
from fliqs_hf.pipeline import search as recipe
from fliqs_hf.pipeline.search import main
from fliqs_hf.selection import FormatScore
from fliqs_hf.tasks import IMAGE_CLASSIFICATION
from fliqs_hf.training.arguments import DataArguments, TrainingArguments
from tests.helpers.models import images
from tests.training.test_data import PROCESSOR, split_of

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "dataset_name": "digits",
    "cache_images": True,
    "use_cpu": True,
    "model_type": "vit",
    "image_size": 8,
    "config_overrides": {
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    },
    "finetune_steps": 20,
    "max_steps": 30,
    "per_device_train_batch_size": 16,
    "max_train_samples": 128,
    "max_eval_samples": 64,
    "save_steps": 5,
    "logging_steps": 5,
    "alternative_images": 4,
    "search_overrides": {"prior_images": 64, "explore_fraction": 0.3},
    "search_space": ["mixed"],
    "target_bits": [4.0],
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(folder / "run")} | changes))
    return file


def result_bytes(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("model.safetensors", "fliqs/allocation.json", "fliqs/policy.jsonl")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    main([str(write(folder))])
    return folder / "run"


def test_the_run_folder_tells_everything(finished: Path) -> None:
    results = json.loads((finished / "fliqs/results.json").read_text())
    layers = [LayerInfo(**layer) for layer in json.loads((finished / "fliqs/layers.json").read_text())]
    allocation = fliqs_hf.Allocation.load(finished / "fliqs/allocation.json")
    assert results["cost"]["bops"] == bops(layers, allocation)
    ratio = bops(layers, allocation) / (sum(layer.macs for layer in layers) * 16)
    assert 0.97 <= ratio <= 1 and results["cost"]["target_ratio"] == pytest.approx(ratio)
    assert results["accuracy"]["fp32"]["n"] == results["accuracy"]["searched"]["n"] == 64
    assert results["checkpoint_bytes"] == (finished / "model.safetensors").stat().st_size
    config = json.loads((finished / "fliqs/settings.json").read_text())
    assert config["seed"] == 0 and "torch" in config["versions"] and config["search"]["prior_images"] == 64
    steps = [json.loads(line) for line in (finished / "fliqs/metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in steps] == [5, 10, 15, 20, 25, 30]
    assert [entry["phase"] for entry in steps] == ["search"] + ["final"] * 5  # frozen after 30 %: 9 steps
    space = json.loads((finished / "fliqs/search_space.json").read_text())
    for line in (finished / "fliqs/policy.jsonl").read_text().splitlines():
        probabilities = json.loads(line)["probabilities"]
        assert list(probabilities) == [decision["name"] for decision in space["decisions"]]
        assert all(abs(sum(p) - 1) < 1e-3 for p in probabilities.values())  # written with five digits
    scores = json.loads((finished / "fliqs/sensitivity.json").read_text())
    assert (scores["images"], scores["passes"]) == (64, 2) and list(scores["scores"]) == [
        decision["name"] for decision in space["decisions"]
    ]
    assert not (finished / "fliqs/state").exists()


def test_the_checkpoint_is_the_result(finished: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(finished)
    allocation = fliqs_hf.Allocation.load(finished / "fliqs/allocation.json")
    assert model.config.quantization_config.allocation == allocation
    assert model.config.id2label == {i: str(i) for i in range(10)}
    with torch.no_grad():
        assert model(images(2)[..., :8, :8]).logits.shape == (2, 10)


def command(file: Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "recipes" / "vit.py"), str(file), *more]


LONG = {"max_steps": 300, "finetune_steps": 5}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    main([str(write(folder, **LONG))])
    return result_bytes(folder / "run")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["ctrl-c", "term", "kill -9"])
def test_an_interrupted_search_resumes_to_the_same_bits(
    stop: signal.Signals, tmp_path: Path, uninterrupted: list[bytes]
) -> None:
    """Long enough that the signal always arrives in mid-run: after the first state, before the last step."""
    file = write(tmp_path, **LONG)
    process = subprocess.Popen(command(file), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    state = tmp_path / "run" / "fliqs/state"
    deadline = time.monotonic() + 120
    while not list(state.glob("step-*/meta.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (-stop if stop == signal.SIGKILL else 128 + stop), output
    assert list(state.glob("step-*/meta.json")) and not (tmp_path / "run" / "fliqs/results.json").exists()
    main([str(file), "--resume"])
    assert result_bytes(tmp_path / "run") == uninterrupted


def test_other_settings_are_not_resumed(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = result_bytes(run)
    with pytest.raises(CheckpointError, match=r"target_bits=\[4\.0\], not \[5\.0\]"):
        main([str(write(tmp_path, target_bits=[5.0])), "--resume"])
    with pytest.raises(CheckpointError, match="seed=0, not 1"):
        main([str(write(tmp_path, seed=1)), "--resume"])
    config = json.loads((run / "fliqs/settings.json").read_text())
    config["search"]["explore_fraction"] = 0.1  # as if the run was of a version with another default
    (run / "fliqs/settings.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"explore_fraction=0\.1, not 0\.3"):
        main([str(write(tmp_path)), "--resume"])
    assert result_bytes(run) == before


def test_a_finished_run_is_not_repeated(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    model = [path for path in run.iterdir() if path.is_file() and path.name != "README.md"]
    times = {path: path.stat().st_mtime_ns for path in model}
    main([str(write(tmp_path)), "--resume"])
    assert "is finished" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in model}


def test_an_earlier_run_in_the_folder_is_not_taken_for_this_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run is started there and stops at once: resuming it finds nothing of the first."""
    run = shutil.copytree(finished, tmp_path / "run")
    before = result_bytes(run)
    with pytest.raises(ConfigError, match=r"holds a run already: add --resume.* --overwrite_output_dir"):
        main([str(write(tmp_path, target_bits=[5.0]))])
    assert result_bytes(run) == before
    file = write(tmp_path, finetune_steps=10, target_bits=[5.0], overwrite_output_dir=True)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "train", crash)
        with pytest.raises(KeyboardInterrupt):
            main([str(file)])
    assert sorted(path.name for path in run.iterdir()) == ["fliqs"]
    main([str(file), "--resume"])
    assert json.loads((run / "fliqs/results.json").read_text())["target"]["bits"] == 5.0


def test_a_run_does_not_replace_what_it_starts_from(finished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = result_bytes(run)
    start = {"model_type": None, "config_overrides": None, "model_name_or_path": str(run / "fliqs/fp32")}
    for steps in (0, 20):
        with pytest.raises(ConfigError, match=r"contains model_name_or_path=.*choose another output"):
            main([str(write(tmp_path, **start, finetune_steps=steps, overwrite_output_dir=True))])
    assert result_bytes(run) == before
    assert (run / "fliqs/fp32" / "model.safetensors").exists()


@pytest.mark.slow
def test_an_interrupted_front_keeps_the_targets_that_are_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails while it writes the second checkpoint: no half of it remains, and resuming starts from the state."""
    granularity = ["--activation_granularity", "per_token_clipped"]  # learned factors are resumed as well
    arguments = [str(write(tmp_path)), "--target_bits", "3", "5", "--max_steps", "20", *granularity]
    original, packed = ViTForImageClassification.save_pretrained, []

    def save(model: Any, folder: Path, **values: Any) -> Any:
        original(model, folder, **values)
        if packed_layers(model):
            packed.append(folder)
        if len(packed) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(ViTForImageClassification, "save_pretrained", save)
    with pytest.raises(TrainingError, match=r"bits-5: .*No space left"):
        main(arguments)
    first, second = (tmp_path / "run" / f"bits-{bits}" for bits in (3, 5))
    assert not (second / "config.json").exists() and not (second / "fliqs/results.json").exists()
    done = (first / "model.safetensors").stat().st_mtime_ns
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:  # the second target has recorded its scores: they are not measured again
        patch.setattr(FormatScore, "__call__", None)
        main([*arguments, "--resume"])
    assert (first / "model.safetensors").stat().st_mtime_ns == done
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert result_bytes(second) == result_bytes(tmp_path / "whole" / "bits-5")
    layers = packed_layers(AutoModelForImageClassification.from_pretrained(second))
    factors = torch.cat([layer.input_scale for layer in layers.values() if layer.input_scale is not None])
    assert len(factors) > 5 and (factors != 1).all() and (factors > 0.5).all()


def test_limits_choose_among_all_images() -> None:
    """Folders of images are sorted by class: the first ones would be of one class."""
    split = split_of(sorted([0, 1, 2] * 30))
    columns = {"image_column": "image", "label_column": "label"}
    chosen = recipe_job.task_data(
        IMAGE_CLASSIFICATION, split, PROCESSOR, ["a", "b", "c"], 30, DataArguments(), columns
    )
    again = recipe_job.task_data(IMAGE_CLASSIFICATION, split, PROCESSOR, list("abc"), 30, DataArguments(), columns)
    assert len(chosen) == 30 and set(chosen.labels) == {0, 1, 2} and chosen.labels == again.labels


@pytest.mark.parametrize(("epochs", "processes", "steps"), [(1.0, 1, 5), (2.0, 1, 9), (0.1, 1, 1), (2.0, 2, 4)])
def test_epochs_are_steps(epochs: float, processes: int, steps: int) -> None:
    """90 images in batches of 10, two to a step: 9 batches (4 with two processes) are 4.5 (2) steps, rounded up."""
    data = recipe_job.task_data(
        IMAGE_CLASSIFICATION, split_of([0] * 90), PROCESSOR, ["a", "b", "c"], None, DataArguments(), {}
    )
    args = TrainingArguments(num_train_epochs=epochs, per_device_train_batch_size=10, gradient_accumulation_steps=2)
    assert recipe_job.steps_of(args, data, processes) == steps


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper", "search_overrides": None},
        {"activation": "separate"},
        {"search_overrides": {"prior_images": 64, "samples_per_step": 2, "explore_fraction": 0.5}},
        {"search_overrides": {"prior_images": 64, "explore_fraction": 0.0}},
        {"search_space": ["int4", "int8"], "target_bits": None, "target_size_mb": [0.026]},
        {"search_space": ["fliqs-l-fp"], "tie": ["block"], "target_bits": [6.0]},
        {"report_to": "tensorboard", "gradient_checkpointing": True},
        {"eval_steps": 2, "load_best_model_at_end": True, "ema_decay": 0.9},
        {"max_steps": None, "num_train_epochs": 1},
        {"augment": ["flip", "mixup"], "label_smoothing_factor": 0.1, "distill": 0.5},
        {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "modules_to_not_convert": ["classifier"]},
    ],
    ids=str,
)
def test_variants_meet_their_target(tmp_path: Path, changes: dict[str, Any]) -> None:
    main([str(write(tmp_path, **({"finetune_steps": 0, "max_steps": 8} | changes)))])
    results = json.loads((tmp_path / "run" / "fliqs/results.json").read_text())
    ratio = results["cost"]["target_ratio"]
    if "target_size_mb" in changes:
        assert results["cost"]["bytes"] <= 26_000 and ratio <= 1
    else:
        assert abs(ratio - 1) <= 0.02 + 1e-9


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"learning_rat": 1}, ConfigError, "did you mean 'learning_rate'"),
        ({"target_bits": [1.0]}, TargetError, "below the cheapest"),
        ({"target_bits": [9.0]}, TargetError, "above the dearest"),
        ({"preset": "best"}, ConfigError, "'best'"),
        ({"search_overrides": {"kappa": 3}}, ConfigError, "kappa"),
        ({"target_bops": [1e6]}, ConfigError, "one kind of target"),
        ({"augment": ["blur"]}, ConfigError, "blur"),
        ({"dataset_name": None}, FliqsError, "no data"),
        ({"config_overrides": {"hiden_size": 8}}, ConfigError, "did you mean 'hidden_size'"),
        ({"model_type": "vitt"}, ConfigError, "did you mean 'vit'"),
        ({"num_train_epochs": 2}, ConfigError, "max_steps=30 or num_train_epochs=2.0, not both"),
        ({"learning_rate": 0}, ConfigError, "learning_rate=0"),
        ({"load_best_model_at_end": True}, ConfigError, "eval_steps"),
        (
            {"load_best_model_at_end": True, "eval_steps": 5, "preset": "paper", "search_overrides": None},
            ConfigError,
            "lower explore_fraction",
        ),
        ({"report_to": "tensorboard, nothing"}, ConfigError, "report_to='nothing' is not available.*tensorboard"),
        ({"per_device_eval_batch_size": 0}, ConfigError, "per_device_eval_batch_size=0"),
        ({"metrics": ["./no_metric"]}, ConfigError, "no_metric"),
        (
            {"model_type": "resnet", "config_overrides": None, "image_size": None, "gradient_checkpointing": True},
            ConfigError,
            "checkpointing",
        ),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, HubError, "a/b/c"),
        ({"model_type": None, "config_overrides": None, "model_name_or_path": "./nowhere"}, ConfigError, "nowhere"),
        ({"modules_to_not_convert": ["nothing"]}, ConfigError, "nothing"),
    ],
)
def test_bad_settings_fail_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], error: type[Exception], named: str
) -> None:
    monkeypatch.setattr(recipe, "train", None)
    with pytest.raises(error, match=named):
        main([str(write(tmp_path, **changes))])
    assert not (tmp_path / "run" / "fliqs/metrics.jsonl").exists()


def test_help_teaches() -> None:
    run = subprocess.run(command(Path("--help")), cwd=ROOT, capture_output=True, text=True, check=True)
    for word in ("accelerate launch recipes/vit.py", "--target_bits", "--search_space", "--resume"):
        assert word in run.stdout


def test_uniform_models_for_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are trained from the same weights, evaluated as packed, reported, and not trained again on resume."""
    file = write(tmp_path, finetune_steps=0, max_steps=6, compare_uniform=["INT4", "fp8"])
    trained = []
    original = recipe.train_formats
    monkeypatch.setattr(recipe, "train_formats", lambda *a, **k: trained.append(a[5]) or original(*a, **k))
    write_results = recipe.RunFolder.write

    def crash(self: Any, name: str, data: Any) -> None:
        if name == "results.json":
            raise KeyboardInterrupt
        write_results(self, name, data)

    monkeypatch.setattr(recipe.RunFolder, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        main([str(file)])
    monkeypatch.setattr(recipe.RunFolder, "write", write_results)
    assert trained == ["search for bits 4", "uniform int4", "uniform e4m3"]
    trained.clear()
    main([str(file), "--resume"])
    assert trained == ["search for bits 4"]

    run = tmp_path / "run"
    accuracy = json.loads((run / "fliqs/results.json").read_text())["accuracy"]
    assert list(accuracy) == ["fp32", "uniform_int4", "uniform_e4m3", "searched"]
    assert AutoModelForImageClassification.from_pretrained(run / "fliqs/uniform_int4").hf_quantizer is not None
    assert "uniform e4m3" in (run / "fliqs/report.html").read_text()
    assert not list((run / "fliqs").glob("*-state"))

    main([str(write(tmp_path, finetune_steps=0, max_steps=4, overwrite_output_dir=True))])
    assert not list((run / "fliqs").glob("uniform_*"))  # another run in the same folder


def test_an_unknown_uniform_format_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compare_uniform: unknown format 'int4x'"):
        main([str(write(tmp_path, compare_uniform=["int4x"]))])


def test_the_default_space_is_that_of_this_machine_and_stays_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(write(tmp_path, search_space=None, target_bits=[5.0], finetune_steps=0, max_steps=2))
    (result,) = main([file])
    settings = json.loads((tmp_path / "run/fliqs/settings.json").read_text())
    formats = ["int4", "e2m1", "e2m3", "int8"]
    assert (settings["hardware"], settings["search_space"], settings["activation"]) == (
        "x86-vnni",
        formats,
        "separate",
    )
    assert result["hardware"]["profile"] == "x86-vnni" and result["hardware"]["share"]["simulated"] == 0
    allocation = fliqs_hf.Allocation.load(tmp_path / "run/fliqs/allocation.json")
    assert {fmt.name for pair in allocation.values() for fmt in (pair.weight, pair.activation) if fmt} <= set(formats)
    monkeypatch.setattr(hardware, "detected", lambda: "x86-avx2")
    with pytest.raises(CheckpointError, match="was started with hardware='x86-vnni', not 'x86-avx2'"):
        main([file, "--resume"])
    assert main([file, "--resume", "--hardware", "x86-vnni"])[0]["hardware"] == result["hardware"]
    with pytest.raises(
        TargetError, match=r"target_bits=3 is below the cheapest .* such as those of search_space mixed"
    ):
        main([file, "--target_bits", "3", "--overwrite_output_dir"])
