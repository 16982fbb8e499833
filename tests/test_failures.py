"""What a program says when it stops: one line, a status, and whose fault it is; limits and extras of one table."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import fliqs_hf_cli
from fliqs_hf import failures, limits
from fliqs_hf.errors import CheckpointError, ConfigError, DependencyError
from fliqs_hf.optional import EXTRAS, install_hint, needed_for
from fliqs_hf.pipeline import compare
from fliqs_hf.training.arguments import ARGUMENTS

ROOT = Path(__file__).parents[1]


def caught(error: BaseException | Any) -> BaseException:
    try:
        if callable(error):
            error()
        else:
            raise error
    except BaseException as found:
        return found
    raise AssertionError


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (ConfigError("a is\n wrong"), "ConfigError: a is wrong", 2),
        (CheckpointError("damaged"), "CheckpointError: damaged", 1),
        (FileNotFoundError(2, "No such file", "x"), "FileNotFoundError: [Errno 2] No such file: 'x'", 2),
        (KeyboardInterrupt("stopped after step 3"), "stopped after step 3", 130),
        (MemoryError("1 GiB"), "MemoryError: 1 GiB; use smaller batches or images", 2),
        (
            ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets"),
            "DependencyError: this needs sklearn: pip install 'fliqs-hf[demo]'",
            2,
        ),
    ],
)
def test_a_line_and_a_status(error: BaseException, line: str, status: int) -> None:
    assert failures.explain(caught(error)) == (line, status)


def test_a_mistake_of_ours_is_not_that_of_a_library() -> None:
    ours, status = failures.explain(caught(lambda: limits.check_values(3)))  # type: ignore[arg-type]
    assert "looks like a bug of fliqs_hf in limits.py:" in ours and status == 2
    theirs, _ = failures.explain(caught(lambda: torch.nn.functional.pad(torch.zeros(1), "x")))  # type: ignore[arg-type]
    assert "raised by torch" in theirs and "looks like a bug" not in theirs


def test_the_traceback_is_for_who_asks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("fliqs_hf.cli.formats.parse", broken)
    for asked, there in (("0", False), ("1", True)):
        monkeypatch.setenv(failures.TRACEBACK, asked)
        assert fliqs_hf_cli.main(["formats", "int4", "--json"]) == 2
        answer = capsys.readouterr()
        assert "ZeroDivisionError: of ours" in json.loads(answer.out)["error"]
        assert ("Traceback" in answer.err) is there


def test_the_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"sklearn": "scikit-learn"}
    for module, extra in EXTRAS.items():
        assert any(entry.startswith(names.get(module, module)) for entry in extras[extra]), module
    brought = {entry.split(">")[0] for extra in set(EXTRAS.values()) for entry in extras[extra]}
    brought = {name for name in brought if not name.startswith("fliqs-hf[")}  # extras of our own are listed already
    assert brought == {names.get(module, module) for module in EXTRAS}


@pytest.mark.parametrize(
    ("module", "use", "extra"),
    [
        ("sklearn", "from fliqs_hf.training import load_splits; load_splits('digits')", "demo"),
        (
            "kornia",
            "from fliqs_hf.training.augment import BatchAugment as B; B(['flip'], 2, [0.5], [0.5])",
            "augment",
        ),
        ("statsmodels", "import fliqs_hf.validation.statistics", "report"),
        ("matplotlib", "import fliqs_hf.report.run_figures", "report"),
        ("matplotlib", "import fliqs_hf.validation.figures", "report"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, use: str, extra: str
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == module or name.startswith(("fliqs_hf.report.", "fliqs_hf.validation.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing(module), *sys.meta_path])
    with pytest.raises(DependencyError, match=rf"needs {module}: pip install 'fliqs-hf\[{extra}\]'"):
        exec(use, {})


class _Missing:
    """A finder that finds one package to be absent."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_an_extra_for_what_a_library_says_in_its_own_words() -> None:
    error = ImportError("DeepSpeed is not installed => run `pip install deepspeed`")
    assert "pip install 'fliqs-hf[deepspeed]'" in install_hint(error)
    with pytest.raises(DependencyError, match="x needs nonesuch: pip install nonesuch"), needed_for("x"):
        import nonesuch  # type: ignore[import-not-found]  # noqa: F401


def test_every_number_has_a_limit() -> None:
    """Arguments to come included: a number without one is accepted at any value."""
    numbers = {
        f.name
        for cls in ARGUMENTS
        for f in fields(cls)
        for hint in [get_type_hints(cls)[f.name]]
        if {int, float} & ({hint} | set(get_args(hint)) | {t for part in get_args(hint) for t in get_args(part)})
    }
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for command in [*commands.choices.values(), compare.parser("compare")]:
        numbers |= {action.dest for action in command._actions if action.type in (int, float)}
    assert numbers == limits.LIMITS.keys()


@pytest.mark.parametrize("name", sorted(limits.LIMITS))
def test_no_number_may_be_none_or_endless(name: str) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), 2**63, -1):
        with pytest.raises(ConfigError, match=f"{name}="):
            limits.check_values({name: value})
        with pytest.raises(ConfigError, match=f"{name}="):
            limits.check_values({name: [value]})
    limits.check_values({name: None})
