"""Arguments: files and the command line, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.arguments import parse

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", [True, False], ids=["first", "--config"])
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_command_line_overrides_a_file(tmp_path: Path, suffix: str, first: bool) -> None:
    file = tmp_path / f"settings.{suffix}"
    settings = {"learning_rate": 0.5, "max_steps": 7, "target_bits": [3.0, 4.0], "use_cpu": True}
    file.write_text(json.dumps(settings))  # JSON is YAML
    arguments = ["--max_steps", "9", "--target_bits", "5", "--use_cpu", "false"]
    _, _, training, search = parse([str(file), *arguments] if first else [*arguments, "--config", str(file)])
    assert (training.learning_rate, training.max_steps, training.use_cpu) == (0.5, 9, False)
    assert search.target_bits == [5.0]
    assert parse([str(file)])[3].target_bits == [3.0, 4.0]


def test_values_in_files_become_what_they_are_meant_as(tmp_path: Path) -> None:
    """YAML reads 1e-4 as a word and 4 as one whole number."""
    file = tmp_path / "settings.yaml"
    file.write_text("learning_rate: 1e-4\ntarget_bits: 4\nsearch_space: mixed\naugment: null\nmax_steps: 5\n")
    _, data, training, search = parse([str(file)])
    assert (training.learning_rate, training.max_steps, data.augment) == (1e-4, 5, None)
    assert (search.target_bits, search.search_space) == ([4.0], ["mixed"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning_rat: 1", "did you mean 'learning_rate'"),
        ("max_steps: 1.5", "max_steps has the value 1.5, but must be int"),
        ("max_steps: true", "max_steps has the value True"),
        ("use_cpu: 3", "use_cpu has the value 3, but must be bool"),
        ("target_bits: [four]", "target_bits has the value 'four'"),
        ("model_type: 3", "model_type has the value 3, but must be str"),
        ("search_overrides: 3", "search_overrides has the value 3"),
        ("- max_steps", "not a list"),
        ("max_steps: [", "cannot read the settings"),
    ],
)
def test_a_bad_file_is_explained(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml") as raised:
        parse([str(file)])
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rat", "1"], "unknown argument '--learning_rat'; did you mean 'learning_rate'"),
        (["--learning-rte=1"], "did you mean 'learning_rate'"),
        (["--max_step", "3"], "did you mean 'max_steps'"),  # argparse would take an abbreviation
        (["stray"], "'stray' is neither a file of settings (.yaml, .yml, .json) nor the name of one that comes with"),
        (["--config", "digit"], "fliqs_hf (digits)"),
        (["--max_steps", "3", "stray"], "unknown argument 'stray'"),
        (["--max_steps", "many"], "'many'"),
        (["--search_overrides", "3"], "search_overrides=3"),
        (["--search_overrides", "{a: "], "search_overrides='{a: ' is no YAML"),
        (["missing.yaml"], "missing.yaml"),
    ],
)
def test_a_bad_command_line_is_explained(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(arguments)
    assert named in str(raised.value)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_configurations_are_valid(file: Path) -> None:
    model, data, training, search = parse([str(file)])
    assert (model.model_name_or_path or model.model_type) and data.dataset_name and search.target_bits
    assert training.output_dir == f"runs/{file.stem}"


def test_settings_that_come_with_the_package_have_a_name() -> None:
    model, data, training, _ = parse(["digits", "--max_steps", "3"])
    assert (model.model_type, data.dataset_name, training.max_steps) == ("vit", "digits", 3)
