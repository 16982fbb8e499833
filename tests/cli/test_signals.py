"""A signal ends any command with a word and the status that shells give, from its first moment on."""

from __future__ import annotations

import importlib
import json
import os
import signal
from typing import Any

import pytest

import fliqs_hf_cli

COMMANDS = {
    "quantize": (["quantize", "m", "o", "--json"], "the same command starts again"),
    "validate": (["validate", "m", "q", "--dataset_name", "digits", "--json"], "the same command starts again"),
    "compare": (["compare", "m"], "the same command goes on where it was"),
    "search": (["search", "x.yaml"], "add --resume to go on"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, number: signal.Signals
) -> None:
    arguments, advice = COMMANDS[name]

    def stopped(_: Any) -> int:
        os.kill(os.getpid(), number)
        raise AssertionError

    monkeypatch.setattr(importlib.import_module(f"fliqs_hf.cli.{name}"), name, stopped)
    before = signal.getsignal(number)
    assert fliqs_hf_cli.main(arguments) == 128 + number
    how = "stopped" if number == signal.SIGINT else f"stopped by {number.name}"
    out, err = capsys.readouterr()
    assert err == f"fliqs-hf: {how}; {advice}\n"
    assert "--json" not in arguments or json.loads(out) == {"error": f"{how}; {advice}"}
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_while_libraries_are_imported(number: signal.Signals) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        with fliqs_hf_cli._importing(), open(2, "w", closefd=False) as fliqs_hf_cli.sys.stderr:
            os.kill(os.getpid(), number)
        os._exit(1)
    os.close(write)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + number
    assert os.read(read, 200).decode() == f"fliqs-hf: stopped by {number.name}; the same command starts again\n"
