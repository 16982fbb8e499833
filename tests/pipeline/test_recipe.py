"""What a search is trained with where the arguments leave it open."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.cost import Target, trace_layers
from fliqs_hf.errors import CheckpointError
from fliqs_hf.pipeline import search
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.pipeline.recipe import BY_BITS, PLAIN, bits_of, completed, recipe_at
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training.arguments import SearchArguments, TrainingArguments
from tests.helpers.models import tiny

LOW = BY_BITS[0][1]
DIGITS = """
dataset_name: digits
model_type: vit
image_size: 16
config_overrides: {patch_size: 4, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}
max_train_samples: 64
max_eval_samples: 32
cache_images: true
use_cpu: true
finetune_steps: 2
max_steps: 4
per_device_train_batch_size: 16
alternative_images: 0
search_space: [int2, int4, int8]
search_overrides: {prior_images: 32}
"""


def problem(target: Target, formats: Any = ("int2", "int3", "e2m0", "int4", "int8")) -> SearchProblem:
    model = tiny("vit")
    layers = trace_layers(model)
    return search_problem(model, layers, SearchSpace(layers, formats), target)


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0])
def test_bits_of_targets_in_bit_operations(bits: float) -> None:
    """Also where the space has no formats near them: BOPs go with the square of the bits."""
    for formats in (("int2", "int8"), ("int2", "int3", "e2m0", "int4", "int8")):
        one = problem(Target.of(target_bits=bits), formats)
        assert bits_of(one) == pytest.approx(bits)
        for same in (Target("bops", one.target_cost), Target("ratio", (bits / 32) ** 2, cap=True)):
            assert bits_of(problem(same, formats)) == pytest.approx(bits)


def test_bits_of_sizes_are_those_of_the_uniform_file_that_is_as_large() -> None:
    table = problem(Target.of(target_size_mb=0.03)).costs
    assert table.measure.of_file
    for bits in (3, 4):
        size = table.uniform(f"int{bits}") / 1e6
        assert bits_of(problem(Target.of(target_size_mb=size))) == pytest.approx(bits, abs=1e-6)
    between = (table.uniform("int4") + table.uniform("int8")) / 2e6
    assert bits_of(problem(Target.of(target_size_mb=between))) == pytest.approx(6, abs=1e-6)


def test_few_bits_have_a_recipe_and_many_that_of_fp32() -> None:
    args = TrainingArguments()
    assert recipe_at(3.0, args, IMAGE_CLASSIFICATION) == LOW != PLAIN
    assert recipe_at(3.5, args, IMAGE_CLASSIFICATION) == recipe_at(8, args, IMAGE_CLASSIFICATION) == PLAIN
    assert recipe_at(3.0, TrainingArguments(recipe="none"), IMAGE_CLASSIFICATION) == PLAIN


def test_a_task_that_cannot_imitate_predictions_imitates_blocks_alone() -> None:
    class Other(Task):
        name = "other"

    found = recipe_at(3.0, TrainingArguments(), Other())
    assert (found.distill, found.distill_features) == (0, LOW.distill_features)


def test_what_is_not_trained_is_not_imitated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From scratch, or with a new head, unless fp32 steps come first."""
    found = recipe_at(3.0, TrainingArguments(), IMAGE_CLASSIFICATION, trained=False)
    assert found == replace(LOW, distill=0.0, distill_features=0.0)
    for steps, imitated in (("0", 0.0), ("2", LOW.distill)):
        run(tmp_path, "--target_bits", "3", "--finetune_steps", steps, "--overwrite_output_dir")
        assert recorded(tmp_path / "run")["distill"] == imitated
        assert f"distill={imitated}," in capsys.readouterr().out


def test_what_is_given_stays_also_where_it_is_0() -> None:
    args, search_args = completed(
        TrainingArguments(distill=0.0), SearchArguments(activation_granularity="per_token"), LOW
    )
    assert (args.distill, search_args.activation_granularity) == (0.0, "per_token")
    assert (args.learning_rate, args.distill_features) == (LOW.learning_rate, LOW.distill_features)


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    (folder / "settings.yaml").write_text(DIGITS)
    return search.main([str(folder / "settings.yaml"), "--output_dir", str(folder / "run"), *arguments])


def recorded(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "fliqs" / "settings.json").read_text())
    return {name: settings[name] for name in asdict(PLAIN)}


def test_every_target_has_its_own_recipe_on_record_and_resumes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configs: list[Any] = []
    original = search.train

    def train(*args: Any, **options: Any) -> Any:
        configs.append((args[2], options["teacher"] is not None))
        return original(*args, **options)

    monkeypatch.setattr(search, "train", train)
    run(tmp_path, "--target_bits", "3", "5", "--compare_uniform", "int8", "int2", "--distill", "0.25")
    few, many = (recorded(tmp_path / "run" / f"bits-{bits}") for bits in (3, 5))
    assert few == asdict(LOW) | {"distill": 0.25} and many == asdict(PLAIN) | {"distill": 0.25}
    assert recorded(tmp_path / "run") == dict.fromkeys(asdict(PLAIN)) | {"distill": 0.25}  # as given
    trained = [(c.learning_rate, c.distill_weight, c.feature_weight, taught) for c, taught in configs]
    low, plain = (LOW.learning_rate, 0.25, LOW.distill_features, True), (PLAIN.learning_rate, 0.25, 0.0, True)
    assert trained == [low, plain, low, plain]  # 3 bits, its uniform models (INT8, INT2), 5 bits
    shown = capsys.readouterr().out
    assert "training with learning_rate=0.0006, distill=0.25, distill_features=30.0" in shown
    granularity = [
        json.loads((tmp_path / "run" / f"bits-{bits}" / "config.json").read_text())["quantization_config"]
        for bits in (3, 5)
    ]
    assert [one["activation_granularity"] for one in granularity] == ["per_token_clipped", "per_token"]
    again = run(
        tmp_path, "--target_bits", "3", "5", "--compare_uniform", "int8", "int2", "--distill", "0.25", "--resume"
    )
    assert len(again) == 2
    with pytest.raises(CheckpointError, match="recipe='auto', not 'none'"):
        run(tmp_path, "--target_bits", "3", "5", "--compare_uniform", "int8", "int2", "--distill", "0.25",
            "--resume", "--recipe", "none")  # fmt: skip


def test_the_file_of_a_search_for_a_size_keeps_to_it_with_its_factors(tmp_path: Path) -> None:
    """Learned factors of inputs are part of the file."""
    larger = "{patch_size: 4, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 128}"
    (result,) = run(tmp_path, "--target_size_mb", "0.022", "--config_overrides", larger)
    assert recorded(tmp_path / "run")["activation_granularity"] == "per_token_clipped"
    size = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert result["checkpoint_bytes"] == size <= 22000
