"""The parser: light, the same through `optimum-cli`, and help that teaches."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fliqs_hf_cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = ("formats", "estimate", "quantize", "validate", "report", "push", "inspect")


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
    import fliqs_hf_cli

    lines = re.findall(
        r'^(?:_\w+ = """)?  fliqs-hf (.*?)(?:\s{2,}.*|""")?$', Path(fliqs_hf_cli.__file__).read_text(), re.M
    )
    assert len(lines) > 15
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    for line in lines:
        parser.parse_args(line.split())


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
