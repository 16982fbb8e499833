"""Mistakes of users in the settings of the recipe: one line that names them, exit status 2, nothing loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fliqs_hf.pipeline import search as recipe
from fliqs_hf_cli import main
from tests.helpers.bad_input import SOURCES, filled, refused
from tests.recipes.test_vit import SETTINGS

pytestmark = pytest.mark.usefixtures("_nothing_is_loaded")

DEEP = "[" * 3000

# Settings of the recipe that differ from a sound file, and what the message names.
RECIPE: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"seed": 2**32}, "seed=4294967296"),
    ({"seed": 10**400}, "seed="),
    ({"mixed_precision": "x"}, "'x'"),
    ({"mixed_precision": "fp16"}, "'fp16'"),
    ({"num_train_epochs": float("nan"), "max_steps": None}, "num_train_epochs=nan"),
    ({"num_train_epochs": float("inf"), "max_steps": None}, "num_train_epochs=inf"),
    ({"num_train_epochs": -1, "max_steps": None}, "num_train_epochs=-1"),
    ({"num_train_epochs": 0, "max_steps": None}, "num_train_epochs=0"),
    ({"num_train_epochs": 1}, "num_train_epochs=1.0, not both"),
    ({"max_steps": 0}, "max_steps=0"),
    ({"max_steps": -5}, "max_steps=-5"),
    ({"max_steps": 1.5}, "1.5"),
    ({"finetune_steps": -1}, "finetune_steps=-1"),
    ({"learning_rate": 0}, "learning_rate=0.0 must be above 0"),
    ({"learning_rate": -1e-4}, "learning_rate=-0.0001"),
    ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ({"learning_rate": float("inf")}, "learning_rate=inf"),
    ({"finetune_learning_rate": 0}, "finetune_learning_rate=0.0"),
    ({"weight_decay": -1}, "weight_decay=-1.0"),
    ({"warmup_ratio": 1.5}, "warmup_ratio=1.5"),
    ({"warmup_ratio": -0.1}, "warmup_ratio=-0.1"),
    ({"warmup_steps": -1}, "warmup_steps=-1"),
    ({"warmup_steps": 31}, "warmup_steps=31 must be between 0 and the 30 steps"),
    ({"warmup_steps": 5, "lr_scheduler_type": "constant"}, "constant_with_warmup"),
    ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, "a constant learning rate has no warmup_ratio=0.1"),
    ({"lr_scheduler_type": "polynomial"}, "'polynomial'"),
    ({"confidence": 0.9}, "confidence=0.9 is of a floor: give max_drop or min_accuracy"),
    ({"max_grad_norm": 0}, "max_grad_norm=0.0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0"),
    ({"per_device_eval_batch_size": -1}, "per_device_eval_batch_size=-1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
    ({"ema_decay": 1}, "ema_decay=1.0"),
    ({"label_smoothing_factor": 2}, "label_smoothing_factor=2.0"),
    ({"distill": -1}, "distill=-1.0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1"),
    ({"logging_steps": 0}, "logging_steps=0"),
    ({"save_steps": 0}, "save_steps=0"),
    ({"eval_steps": -1}, "eval_steps=-1"),
    ({"load_best_model_at_end": True}, "set eval_steps"),
    ({"train_val_split": 0}, "train_val_split=0.0"),
    ({"train_val_split": float("nan")}, "train_val_split=nan"),
    ({"max_train_samples": 0}, "max_train_samples=0"),
    ({"max_eval_samples": -3}, "max_eval_samples=-3"),
    ({"report_to": "nonesuch"}, "report_to='nonesuch'"),
    ({"report_to": ""}, "report_to='' is empty"),
    ({"run_name": "mine"}, "run_name='mine' is for trackers"),
    ({"run_name": "mine", "report_to": "tensorboard"}, "cannot be given to tensorboard"),
    ({"hub_model_id": "a/b/c"}, "a/b/c"),
    ({"hub_model_id": "what a name"}, "what a name"),
    ({"hub_model_id": ""}, "hub_model_id='' is empty"),
    ({"output_dir": ""}, "output_dir='' is empty"),
    ({"output_dir": "a\0b"}, "zero byte"),
    ({"dataset_name": ""}, "dataset_name='' is empty"),
    ({"dataset_name": None}, "give either dataset_name"),
    ({"train_dir": "photos"}, "give either dataset_name"),
    ({"search_space": []}, "search_space is an empty list"),
    ({"search_space": ["int4", "int4"]}, "int4 more than once"),
    ({"search_space": ["nonesuch"]}, "nonesuch"),
    ({"search_space": ""}, "search_space='' is empty"),
    ({"compare_uniform": ["nonesuch"]}, "nonesuch"),
    ({"target_bits": 0}, "target_bits=0.0"),
    ({"target_bits": [4, float("nan")]}, "target_bits=nan"),
    ({"target_bits": float("inf")}, "target_bits=inf"),
    ({"target_bits": -4}, "target_bits=-4.0"),
    ({"target_bits": []}, "target_bits is an empty list"),
    ({"target_bits": [4, 4]}, "more than once"),
    ({"target_bits": [4, 4.0000001]}, "more than once"),
    ({"target_bits": 4, "target_ratio": 0.1}, "target_bits and target_ratio"),
    ({"limits": ["size_mb"]}, "give NAME=VALUE"),
    ({"limits": ["size_mb=1", "size_mb=2"]}, "limits has 'size_mb' more than once"),
    ({"target_bits": None, "target_ratio": 2}, "target_ratio=2.0"),
    ({"target_bits": None, "target_size_mb": 0}, "target_size_mb=0.0"),
    ({"activation": "other"}, "'other'"),
    ({"preset": "nonesuch"}, "nonesuch"),
    ({"search_overrides": {"nonesuch": 1}}, "nonesuch"),
    ({"search_overrides": {"name": 1}}, "'name'"),
    ({"search_overrides": {"prior_images": 0}}, "prior_images=0"),
    ({"search_overrides": {1: 2}}, "search_overrides"),
    ({"search_overrides": [1]}, "search_overrides"),
    ({"augment": ["nonesuch"]}, "nonesuch"),
    ({"augment": ["mixup", "cutmix"]}, "mixup or cutmix"),
    ({"streaming": True}, "streaming"),
    ({"model_type": None}, "give either model_name_or_path"),
    ({"model_name_or_path": "x"}, "give either model_name_or_path"),
    ({"model_type": "vitt"}, "did you mean 'vit'"),
    ({"model_type": "bert", "config_overrides": None, "image_size": None}, "not an image classifier"),
    ({"model_type": ""}, "model_type='' is empty"),
    ({"image_size": 0}, "image_size=0 must be at least 1"),
    ({"image_size": -8}, "image_size=-8"),
    ({"image_size": 3}, "image_size=3 is no multiple"),
    ({"image_size": 10}, "image_size=10 is no multiple"),
    ({"image_size": 10**30}, "finite"),
    ({"bf16": True, "mixed_precision": "no"}, "contradicts"),
    ({"bf16": "maybe"}, "'maybe'"),
    ({"resume_from_checkpoint": "elsewhere"}, "'elsewhere' is not in output_dir"),
]
OVERRIDES: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size=0"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_size": -32}, "hidden_size=-32"),
    ({"hidden_size": 2**62}, "hidden_size"),
    ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    ({"num_hidden_layers": 1.5}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 must divide hidden_size=32"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"intermediate_size": None}, "intermediate_size"),
    ({"patch_size": 0}, "patch_size=0"),
    ({"patch_size": 16}, "image_size=8 is no multiple of patch_size=16"),
    ({"image_size": 16}, "contradicts"),
    ({"num_labels": 3}, "leave num_labels=3 out"),
    ({"id2label": {0: "a"}}, "id2label"),
    ({"return_dict": False}, "return_dict"),
    ({"model_type": "beit"}, "model_type"),
    ({"num_channels": 1}, "num_channels=1"),
    ({"hidden_act": "nonesuch"}, "nonesuch"),
    ({"hidden_dropout_prob": 3.0}, "3.0"),
    ({"hidden_dropout_prob": float("nan")}, "config_overrides"),
    ({"layer_norm_eps": -1.0}, "layer_norm_eps=-1.0"),
    ({"hiden_size": 4}, "did you mean 'hidden_size'"),
    ({"to_dict": 3}, "no setting 'to_dict'"),
    ({1: 2}, "config_overrides"),
]
# Whole files.
FILES = [
    ("", "holds no settings"),
    ("# nothing", "holds no settings"),
    ("- seed", "not a list"),
    ("seed", "not a str"),
    ("4", "not a int"),
    ("seed: [", "cannot read the settings"),
    ("seed: 1\nseed: 2\n", "the key 'seed' is there twice"),
    ("config_overrides: {a: 1, a: 2}", "the key 'a' is there twice"),
    ("config_overrides: &a {a: *a}", "JSON cannot"),
    ("config_overrides: {a: 2020-01-01}", "JSON cannot"),
    ("output_dir: 2024-99-99", "cannot read the settings"),
    (f"seed: {DEEP}", "cannot read the settings"),
    (f"seed: {'9' * 5000}", "cannot read the settings"),
    ("seed: ١x", "seed"),
    ("größe: 3", "unknown key 'größe'"),
    ("1: 2", "unknown key 1"),
    ("fp16: true", "mixed_precision: bf16"),
    ("trust_remote_code: true", "code of a checkpoint is never run"),
    ("eval_strategy: steps", "use eval_steps"),
    ("save_strategy: epoch", "use save_steps"),
    ("save_total_limit: 3", "only the last state is kept"),
    ("batch_size: 3", "per_device_train_batch_size"),
    ("adam_beta1: 0.9", "Trainer has it, this recipe does not"),
]
LINES = [
    (["--batch_size", "3"], "use per_device_train_batch_size"),
    (["--lr", "3"], "use learning_rate"),
    (["--epochs=3"], "use num_train_epochs"),
    (["--eval-strategy", "steps"], "use eval_steps"),
    (["--trust_remote_code"], "code of a checkpoint is never run"),
    (["--token", "hf_secret"], "seen by every user"),
    (["--seed", "-1"], "seed=-1"),
    (["--seed", "x"], "'x'"),
    (["--mixed_precision", "x"], "'x'"),
    (["--learning_rate", "nan"], "learning_rate=nan"),
    (["--use_cpu", "perhaps"], "perhaps"),
    (["--config", "{}"], "is neither a file of settings"),
    (["{}/vit"], "is neither a file of settings"),
    (["--config_overrides", "{a: 1, a: 2}"], "is there twice"),
]


def recipe_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], text: str, named: str, more: list[str] | None = None
) -> None:
    file = folder / "settings.yaml"
    file.write_text(text, encoding="utf-8")
    capsys.readouterr()
    status = recipe.script([str(file), *(more or [])])
    refused(status, *capsys.readouterr(), named)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [*RECIPE, *(({"config_overrides": SETTINGS["config_overrides"] | c}, named) for c, named in OVERRIDES)],
    ids=str,
)
def test_the_recipe_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], named: str
) -> None:
    text = yaml.safe_dump(SETTINGS | {"output_dir": str(tmp_path / "run")} | changes)
    recipe_refuses(tmp_path, capsys, text, named)


@pytest.mark.parametrize(("text", "named"), FILES, ids=[str(number) for number in range(len(FILES))])
def test_a_settings_file_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    recipe_refuses(tmp_path, capsys, text, named)


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"\xff\xfe\xfa", "seed: \u2028".encode("utf-16")])
def test_a_settings_file_may_be_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "s.yaml").write_bytes(content)
    refused(recipe.script([str(tmp_path / "s.yaml")]), *capsys.readouterr(), "cannot read the settings")


@pytest.mark.parametrize(("arguments", "named"), LINES, ids=str)
def test_a_command_line_of_the_recipe_says_what_is_wrong(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | {"output_dir": str(tmp_path / "run")}))
    arguments = filled(arguments, there) if "{}" in arguments[-1] else arguments
    first = [] if arguments == [str(there / "vit")] else [str(file)]
    capsys.readouterr()
    refused(recipe.script([*first, *arguments]), *capsys.readouterr(), named)
    assert main(["search", *first, *arguments, "--json"]) == 2
    assert named in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("source", "named"),
    [(source, named) for source, named in SOURCES if source.strip()]
    + [("{}/text", "bert, which is not an image classifier"), ("{}/no_processor", "image processor")],
)
def test_the_recipe_reads_the_model_before_the_data(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, named: str
) -> None:
    changes = {
        "model_type": None, "config_overrides": None, "image_size": None, "output_dir": str(tmp_path / "run"),
        "model_name_or_path": source.replace("{}", str(there)),
    }  # fmt: skip
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(SETTINGS | changes))
    capsys.readouterr()
    expected = "is quantized already" if "foreign" in source else named
    refused(recipe.script([str(file)]), *capsys.readouterr(), expected)
