"""The parser: light, the same through `optimum-cli`, and help that teaches."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fliqs_hf_cli
from fliqs_hf_cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "formats",
    "estimate",
    "profile",
    "quantize",
    "front",
    "recommend",
    "validate",
    "report",
    "push",
    "inspect",
)
#: What people's scripts may have: it stays when the parser changes, and more may come. Beside --help and --json.
OPTIONS = {
    "formats": "",
    "estimate": "allocation formats hardware image_size layers modules_to_not_convert revision",
    "hardware": "hardware revision",
    "front": "activation calibration costs hardware latency_table points revision search_space",
    "recommend": "calibration confidence hardware held_out held_out_images max_drop min_accuracy overwrite revision",
    "profile": "activation batch_size device estimate overwrite revision rounds search_space threads",
    "quantize": (
        "activation activation_format activations allocation batch_size bias_correction calibration "
        "calibration_images calibration_split confidence device held_out held_out_images held_out_split "
        "max_drop min_accuracy fold_batchnorm hardware image_column label_column "
        "latency_table match_labels min_bits modules_to_not_convert overwrite require revision rounding "
        "search_space target "
        "target_bits target_bops target_energy_uj target_latency_ms target_memory_mb target_ratio target_size_mb "
        "weight_format weight_scale"
    ),
    "search": "",
    "compare": "",
    "validate": (
        "batch_size confidence dataset_name device image_column label_column match_labels max_drop "
        "max_samples output split"
    ),
    "export": (
        "batch_size dataset_name external_data form image_column include_preprocessing input_scales "
        "max_samples min_agreement opset overwrite split to weight_codes"
    ),
    "report": "",
    "push": "base_model commit_message create_pr license private revision",
    "inspect": "layers revision",
}


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def test_no_option_goes_away() -> None:
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    for name, command in commands_of(parser).items():
        expected = {f"--{option}" for option in OPTIONS[name].split()}
        assert expected <= set(command._option_string_actions), name


def test_recommend_has_all_that_quantize_reads() -> None:
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    plain, found = (
        vars(parser.parse_args([name, "m", "o", "--calibration", "d"])) for name in ("quantize", "recommend")
    )
    assert plain.keys() <= found.keys() and found["rounding"] is None
    own = {"fliqs_command", "hardware", "held_out_images", "calibration_images", "floor_steps"}
    assert {key: found[key] for key in plain.keys() - own} == {key: plain[key] for key in plain.keys() - own}


def test_every_command_is_a_file_of_arguments_and_one_of_what_it_does() -> None:
    told = {path.stem for path in (ROOT / "fliqs_hf_cli").glob("*.py")} - {"__init__", "__main__", "parser"}
    done = {path.stem for path in (ROOT / "fliqs_hf" / "cli").glob("*.py")}
    assert told == set(fliqs_hf_cli.COMMANDS) <= done


def test_help_imports_nothing_heavy() -> None:
    """Start-up is what it imports: the package itself would bring Transformers and torch."""
    code = (
        "import sys, fliqs_hf_cli\n"
        "try: fliqs_hf_cli.main(['quantize', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'fliqs_hf', 'torch', 'transformers', 'numpy'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"  fliqs-hf {command}" in text
    assert "--json" in text


def test_the_examples_parse() -> None:
    """Examples in the help use arguments that exist."""
    parser = fliqs_hf_cli.Parser(epilog=fliqs_hf_cli.EXAMPLES)
    fliqs_hf_cli.add_commands(parser)
    texts = [command.epilog or "" for command in (parser, *commands_of(parser).values())]
    lines = re.findall(r"^  fliqs-hf (.*?)(?:\s{2,}.*)?$", "\n".join(texts), re.M)
    assert len(lines) > 15
    for line in lines:
        parser.parse_args(line.split())


@pytest.mark.slow
def test_optimum_cli_has_the_command() -> None:
    cli = shutil.which("optimum-cli", path=str(Path(sys.executable).parent))
    assert cli, "optimum is among the test dependencies"
    for command in COMMANDS:
        done = subprocess.run([cli, "fliqs", command, "--help"], capture_output=True, text=True, check=True)
        assert f"optimum-cli fliqs {command}" in done.stdout
    done = subprocess.run([cli, "fliqs", "formats", "int4", "--json"], capture_output=True, text=True, check=True)
    assert '"int4"' in done.stdout
    done = subprocess.run([cli, "fliqs", "formats", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    done = subprocess.run([cli, "fliqs", "search", "--target_bit", "4"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean 'target_bits'" in done.stderr


def test_no_command_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "quantize" in capsys.readouterr().out
    assert main(["--version"]) == 0
