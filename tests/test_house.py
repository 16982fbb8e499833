"""The rules of the house that a program can check: layers, a light import, file length, safe loading."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fliqs_hf"
MODULES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted((ROOT / "recipes").rglob("*.py"))
COMMANDS = sorted((ROOT / "fliqs_hf_cli").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
ALL = MODULES + COMMANDS + SCRIPTS + TESTS

#: The part of the package -> its level, from the table of CONTRIBUTING.md. A module imports only from its own or a
#: lower level. The package itself, which re-exports, is above all of them.
LEVELS = {
    part: int(level)
    for level, parts in re.findall(r"^\| (\d+) \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M)
    for part in re.findall(r"`(\w+)`", parts)
}
PUBLIC_LEVEL = max(LEVELS.values()) + 1

MAX_LINES = 400
MAX_FUNCTION_LINES = 60

#: What `import fliqs_hf` must leave to those who use it. Transformers itself brings accelerate, Jinja, PIL and YAML.
HEAVY = [
    "datasets", "deepspeed", "evaluate", "kornia", "matplotlib", "onnx", "onnx_ir", "onnxruntime", "onnxscript",
    "openvino", "optimum", "optuna", "pandas", "peft", "plotly", "pyarrow", "scipy", "sklearn", "statsmodels",
    "tensorboard", "torch._dynamo", "torchvision", "trackio", "triton",
]  # fmt: skip


def tracked() -> list[str]:
    """The files of the repository, as paths in it; deleted ones too until that is committed."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return list(filter(None, listing.stdout.split("\0")))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, those inside functions too; `package` resolves relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def level_of(name: str) -> int | None:
    """Level of a dotted name, None if it is not of this package. What the package itself holds is on the highest."""
    first, _, rest = name.partition(".")
    if first != PACKAGE.name:
        return None
    return LEVELS.get(rest.partition(".")[0], PUBLIC_LEVEL)


def upward_imports(source: str, name: str, package: str) -> list[str]:
    own = level_of(name)
    assert own is not None
    return [
        f"{name}:{line} imports {other}"
        for line, other in imported(ast.parse(source), package)
        if (level := level_of(other)) is not None and level > own
    ]


@pytest.mark.parametrize("source", [
    "from fliqs_hf.selection.space import SearchSpace",
    "import fliqs_hf.report",
    "from fliqs_hf import quantize",
    "from ..hf import config",
    "from .. import hf",
    "def f():\n    from fliqs_hf.nn import packed",
    "if TYPE_CHECKING:\n    from fliqs_hf.training.loop import Loop",
])  # fmt: skip
def test_an_upward_import_is_found(source: str) -> None:
    assert len(upward_imports(source, "fliqs_hf.quant.fake", "fliqs_hf.quant")) == 1


def test_imports_that_are_allowed_are_not_found() -> None:
    source = (
        "import torch\nfrom . import scale\nfrom .scale import absmax\nfrom ..allocation import Allocation\n"
        "from fliqs_hf import errors\nimport fliqs_hf.formats.spec\nfrom fliqs_hf.quant import scale"
    )
    assert upward_imports(source, "fliqs_hf.quant.fake", "fliqs_hf.quant") == []


def names_of(path: Path) -> tuple[str, str]:
    """Dotted names of a file as a module, and of the package that it is in or, as `__init__`, is."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = ".".join(parts[:-1])
    return (package if parts[-1] == "__init__" else ".".join(parts)), package


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_down(path: Path) -> None:
    assert upward_imports(path.read_text(encoding="utf-8"), *names_of(path)) == []


def circles(sources: dict[str, tuple[str, str]]) -> list[list[str]]:
    """Modules that import one another, inside functions too. Imports for types alone never run: they are left out.

    Args: sources: module -> its source and its package.
    """
    graph = {}
    for name, (source, package) in sources.items():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        # A name of a package that is a module is that module, and not what the package re-exports.
        found = {other if other in sources else other.rpartition(".")[0] for _, other in imported(tree, package)}
        graph[name] = (found & sources.keys()) - {name}
    reached = {name: {name} for name in graph}
    grown = True
    while grown:
        grown = False
        for name, others in graph.items():
            more = set().union(*(reached[other] for other in others)) - reached[name] if others else set()
            reached[name] |= more
            grown = grown or bool(more)
    rings = {tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph}
    return [list(ring) for ring in sorted(rings) if len(ring) > 1]


def test_circles_are_found() -> None:
    of = {"p": ("from p.a import x", "p"), "p.a": ("def f():\n    from . import b", "p"), "p.b": ("import p.c", "p")}
    assert circles({**of, "p.c": ("", "p")}) == []
    assert circles({**of, "p.c": ("from p.a import x", "p")}) == [["p.a", "p.b", "p.c"]]
    assert circles({**of, "p.c": ("if TYPE_CHECKING:\n    from p.a import x", "p")}) == []


def test_no_two_files_import_each_other() -> None:
    sources = {}
    for path in MODULES:
        name, package = names_of(path)
        sources[name] = (path.read_text(encoding="utf-8"), package)
    assert circles(sources) == []


def test_the_folder_map_names_what_is_there() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert parts == LEVELS.keys(), "the table in CONTRIBUTING.md"
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (beside,) = re.findall(r"^Beside the package: (.*?)\n\n", text, re.M | re.S)
    folders = {name.partition("/")[0] for name in tracked() if "/" in name and not name.startswith(".")}
    assert set(re.findall(r"`(\w+)/`", beside)) == folders - {PACKAGE.name}


def test_tests_mirror_the_package() -> None:
    """A folder of tests for each folder of the package; those of its files lie beside this one."""
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    own = ROOT / "tests"
    tested = {path.parent.name for path in own.glob("*/test_*.py")}
    assert tested - {"distributed", "extensions", "gpu", "recipes"} == folders
    files = {path.stem for path in MODULES if path.parent == PACKAGE}
    beside = {path.stem.removeprefix("test_") for path in own.glob("*.py")}
    assert beside - {"__init__", "conftest", "house", "docs", "bad_input"} <= files


def test_import_is_light_and_registers() -> None:
    code = (
        "import json, sys, fliqs_hf, torch\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        "print(json.dumps([list(sys.modules), torch.cuda.is_initialized(), 'fliqs' in known]))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    modules, cuda, registered = json.loads(run.stdout)
    assert sorted(set(HEAVY) & set(modules)) == []
    assert not cuda
    assert registered
    assert run.stderr == ""  # no warning either


def test_the_wheel_has_no_folder_of_another_package() -> None:
    """A folder `optimum` in it would make Transformers' `is_optimum_available()` true where optimum is missing."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["fliqs_hf*"]
    assert not (ROOT / "optimum").exists()


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_LINES, f"{lines} lines: does it do two jobs?"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    sizes = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{relative(path)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


#: What is written once: a pattern -> the one file of the package that has it, and what others call instead.
ONCE = {
    r"\bos\.(replace|rename)\(|\.rename\(|shutil\.move": ("files", "replacing, move_into"),
    r"\bget_close_matches\b|\bdifflib\b": ("errors", "did_you_mean, nearest"),
    r"\bjinja2\.Environment\b": ("hf/templating", "environment"),
    r"\.convert\((mode|[\"'](RGB|L)[\"'])": ("training/images", "decoded, pixels"),
    r"= \w+(\.\w+)*\.training$|\.training for\b": ("nn/evaluation", "evaluation, modes_kept"),
    r"\.casefold\(\)": ("training/labels", "find_match, match_given, match_trained"),
}


def copies(sources: dict[str, str], pattern: str, home: str) -> list[str]:
    """Where files other than `home` have what matches, by line; the home itself must have it."""
    places = [f"{name}:{i}" for name, text in sources.items() for i, line in enumerate(text.splitlines(), 1)
              if re.search(pattern, line)]  # fmt: skip
    assert any(place.startswith(f"{home}:") for place in places), f"{home} has no {pattern} any more"
    return [place for place in places if not place.startswith(f"{home}:")]


def test_copies_are_found() -> None:
    sources = {"files": "os.replace(a, b)", "nn/x": "import os\nos.replace(a, b)", "nn/y": "text.replace(a, b)"}
    assert copies(sources, next(iter(ONCE)), "files") == ["nn/x:2"]


@pytest.mark.parametrize(("pattern", "home", "instead"), [(k, *v) for k, v in ONCE.items()], ids=lambda x: str(x)[:20])
def test_what_has_a_place_is_written_once(pattern: str, home: str, instead: str) -> None:
    folders = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES}
    sources = {name: path.read_text(encoding="utf-8") for path, name in folders.items()}
    assert copies(sources, pattern, home) == [], f"call {instead} of {home}.py instead"


#: What a classifier's output is and how it is measured: of `fliqs_hf.tasks` alone. A policy has logits of its own.
OF_A_TASK = re.compile(
    r"cross_entropy|(?<!policy)\.logits\b|(?<!\.)\blogits\.(argmax|topk|softmax)|ForImageClassification\b"
    r"|argmax\([^)]*\) == |IMAGE_CLASSIFICATION\.(?!name)"
)
#: Other places that have such words: file -> why.
NOT_OF_A_TASK = {"oneshot/policy.py": "the logits of the policy"}


def test_what_is_of_a_task_is_found() -> None:
    found = ["functional.cross_entropy(x, y)", "model(x).logits", "logits.argmax(-1)", "(x.argmax(-1) == y).sum()",
             "AutoModelForImageClassification", "IMAGE_CLASSIFICATION.prediction(x)"]  # fmt: skip
    assert all(OF_A_TASK.search(line) for line in found)
    fine = ["self.policy.logits.argmax()", "task: Task = IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION.name"]
    assert not any(OF_A_TASK.search(line) for line in fine)


def test_nothing_but_tasks_knows_what_an_output_means() -> None:
    found: dict[str, list[str]] = {}
    for path in MODULES:
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if OF_A_TASK.search(line)]
        if lines and not name.startswith("tasks/"):
            found[name] = lines
    assert {name: lines for name, lines in found.items() if name not in NOT_OF_A_TASK} == {}
    assert found.keys() == NOT_OF_A_TASK.keys(), "those that need no exception any more"


UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe_loads(source: str) -> list[str]:
    """Imports of unpicklers, and calls of `torch.load` that may run code from the file."""
    tree = ast.parse(source)
    found = [f"{line}: import {name}" for line, name in imported(tree, "") if name.partition(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            found += [] if safe else [f"{node.lineno}: torch.load without weights_only=True"]
        elif isinstance(node, ast.Call) and any(
            k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords
        ):
            found.append(f"{node.lineno}: allow_pickle")
    return found


def test_unsafe_loads_are_found() -> None:
    source = (
        "import pickle\nfrom pickle import load\ntorch.load(path)\ntorch.load(path, weights_only=False)\n"
        "np.load(path, allow_pickle=True)\ntorch.load(path, weights_only=True)\nnp.load(path)"
    )
    assert [line.partition(":")[0] for line in unsafe_loads(source)] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=relative)
def test_no_file_can_run_code_by_being_loaded(path: Path) -> None:
    assert unsafe_loads(path.read_text(encoding="utf-8")) == []


#: Absolute paths of one person's or one machine's folders. Written in pieces, so that this file has none.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:" + "|".join(["home", "Users", "root", "work", "tmp"]) + r")/\w")


def test_machine_paths_are_found() -> None:
    assert MACHINE_PATH.search("--model " + "/home" + "/someone/model")
    assert MACHINE_PATH.search('"' + "/tmp" + '/run"')
    for allowed in ["../shared/data/cifar10", "https://example.org/home/x", "runs/tmp/x", "/usr/bin/env"]:
        assert not MACHINE_PATH.search(allowed)


def test_no_file_names_a_folder_of_one_machine() -> None:
    found = []
    for name in tracked():
        path = ROOT / name
        if not path.is_file():  # deleted, not yet committed
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert found == []
