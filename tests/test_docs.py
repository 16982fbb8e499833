"""Documentation that works: every Python block runs as it stands, every link leads somewhere, settings exist."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import ViTImageProcessor

import fliqs_hf
import fliqs_hf_cli
from fliqs_hf import FLIQSConfig
from fliqs_hf.oneshot import SearchConfig
from fliqs_hf.pipeline import compare
from fliqs_hf.pipeline.compare_methods import check_methods
from fliqs_hf.training.arguments import parse
from tests.helpers.hub_server import HubServer, Repo
from tests.helpers.models import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[object]:
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "my-vit")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("code", blocks("json"))
def test_json_blocks_are_configurations(code: str) -> None:
    assert FLIQSConfig.from_dict(json.loads(code)).to_dict() == json.loads(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_commands_of_the_recipe_have_arguments_that_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    commands = re.findall(r"^(?:python|accelerate launch) recipes/vit\.py (.*)$", text, re.M)
    assert commands
    for command in commands:
        arguments = command.split("#")[0].split()
        if arguments != ["--help"]:
            parse([str(ROOT / a) if a.endswith(".yaml") else a for a in arguments])


def test_commands_have_arguments_that_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
    commands = re.findall(r"^(?:fliqs-hf|optimum-cli fliqs) (.*)$", text, re.M)
    assert len(commands) > 8
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    for command in commands:
        if "[" in command or command.split()[0].isupper():  # a synopsis
            continue
        arguments = parser.parse_args(re.split(r"#|\|\|", command)[0].split())
        if hasattr(arguments, "rest") and command.startswith("compare"):
            check_methods(compare.parser("compare").parse_args(arguments.rest).methods)
        elif hasattr(arguments, "rest"):
            parse([str(ROOT / a) if a.endswith(".yaml") else a for a in arguments.rest])


@pytest.mark.slow
def test_the_quick_start_runs(tmp_path: Path) -> None:
    """Its commands as they stand, in a folder of their own, without a checkout."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.S)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", "-e", "-c", block], cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for name in ("fliqs/report.html", "fliqs/validation.html", "model.safetensors"):
        assert (tmp_path / "runs" / "quickstart" / name).is_file()


@pytest.mark.slow
def test_the_pilot_of_the_readme_runs(tmp_path: Path) -> None:
    """Its commands as they stand, with a small model under that name on a Hub of our own, and a folder of images."""
    (pilot,) = re.findall(r"```\n(fliqs-hf estimate .*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (name,) = set(re.findall(r"facebook/\S+", pilot))
    model, generator = tiny("vit"), torch.Generator().manual_seed(0)
    model.config.id2label = {i: f"kind {i}" for i in range(model.config.num_labels)}
    model.config.label2id = {label: i for i, label in model.config.id2label.items()}
    for split in ("train", "test"):
        for label in model.config.label2id:
            (folder := tmp_path / "photos" / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    model.save_pretrained(tmp_path / "original")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "original")
    with HubServer() as hub:
        hub.repos[name] = Repo(private=False)
        files = {file.name: (file.read_bytes(), False) for file in (tmp_path / "original").iterdir()}
        hub.repos[name].commit("main", files, "theirs")
        commands = [line.split("#")[0].split() for line in pilot.splitlines()]
        assert [command[1] for command in commands] == ["estimate", "quantize", "validate", "report", "push"]
        for command in commands:
            run = subprocess.run(
                [sys.executable, "-m", "fliqs_hf_cli", *command[1:]], cwd=tmp_path, capture_output=True, text=True,
                env=hub.environment(tmp_path / "home"), check=False,
            )  # fmt: skip
            # Twenty images cannot open the gate.
            assert run.returncode == 0 or (command[1] == "validate" and "Undecided" in run.stdout), run.stderr[-2000:]
        assert {"fliqs/report.html", "README.md", "model.safetensors"} <= set(hub.repos[commands[-1][3]].files())
        assert hub.repos[commands[-1][3]].private


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`(\w+)[^`]*`", "\n".join(re.findall(r"^\| (`[^|]*) \|", text, re.M))))
    assert table == set(fliqs_hf.__all__)
    assert all(getattr(fliqs_hf, name) for name in fliqs_hf.__all__)


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_recipe_configurations_are_valid(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    arguments = {key: value for part in parse([str(file)]) for key, value in vars(part).items()}
    assert all(arguments[key] == value for key, value in settings.items())


def test_the_defaults_in_the_search_page_are_the_defaults() -> None:
    page, config = (ROOT / "docs" / "search.md").read_text(encoding="utf-8"), SearchConfig()
    rows = re.findall(r"^\| `(\w+)` \| `?([\w.]+)", page, re.M)
    assert len(rows) >= 5
    for name, value in rows:
        assert str(getattr(config, name)) == value, name


RESULTS = ROOT / "recipes" / "bench" / "results"
#: Row of the README's table -> method in the files of results, and column of the digits in the evidence.
SHOWN = {
    "search, trained on labels alone as all below": ("search", "search"),
    "Fisher scores, integer program, training in the result": ("fisher", "fisher"),
    "the same with loss deltas": ("loss-delta", "loss-delta"),
    "uniform FP3 / FP4": ("uniform-fp", ""),
    "uniform integers": ("uniform-int", "uniform INT3"),
}


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]


def written(name: str) -> list[list[str]]:
    """Rows of a table that `compare` has written, without the memory, which pages leave out."""
    found = rows((RESULTS / name).read_text(encoding="utf-8"))
    return [row[:6] + row[7:] for row in found]


def test_the_tables_of_the_evidence_are_those_that_compare_has_written() -> None:
    known = [row for file in RESULTS.glob("compare-*.md") for row in written(file.name)]
    shown = [row for row in rows((ROOT / "docs/evidence.md").read_text(encoding="utf-8")) if len(row) == 7]
    methods = [row for row in shown if re.fullmatch(r"[\d.]+", row[0])]
    assert len(methods) > 20 and [row for row in methods if row not in known] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_the_table_of_the_readme_is_of_the_same_figures() -> None:
    """Starred figures are of the older file; the digits are those of the evidence, of which they are the means."""
    files = {"": "compare-cifar10-two-passes.md", " *": "compare-cifar10-deit-tiny.md"}
    cifar = {star: {(r[1], r[0]): r[2].split(" ±")[0] for r in written(name)} for star, name in files.items()}
    evidence = rows((ROOT / "docs/evidence.md").read_text(encoding="utf-8"))
    head = next(row for row in evidence if row[0] == "split")
    mean = dict(zip(head, next(row for row in evidence if row[0] == "mean"), strict=True))
    splits = [row for row in evidence if row[0].startswith("digits:")]
    for column, name in enumerate(head[1:], 1):  # both are rounded to hundredths: half a one each, and float64
        assert abs(sum(float(row[column]) for row in splits) / len(splits) - float(mean[name])) <= 0.01 + 1e-9
    table = {row[0]: row[1:] for row in rows((ROOT / "README.md").read_text(encoding="utf-8"))}
    for label, (method, digits) in SHOWN.items():
        three, four, third = table[label]
        for bits, shown in (("3", three), ("4", four)):
            if shown:
                star = " *" if shown.endswith("*") else ""
                assert cifar[star][method, bits] == shown.removesuffix(" *"), (label, bits)
        assert third == mean.get(digits, "")


def test_what_the_recipe_gives_is_said_as_it_was_measured() -> None:
    """In the readme to tenths, mean over seeds; in the evidence every figure."""
    text = (ROOT / "recipes/bench/results/compare-cifar10-recipe.csv").read_text(encoding="utf-8")
    found: dict[str, list[float]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        found.setdefault(row["target_bits"], []).append(100 * float(row["top1"]))
    three, fewer = found["3"], found["2.5"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    mean, least = sum(three) / len(three), sum(fewer) / len(fewer)
    assert f"{mean:.1f} % at 3 bits, {least:.0f} % at 2.5, on 2500 images" in readme
    evidence = rows((ROOT / "docs/evidence.md").read_text(encoding="utf-8"))
    table = {row[0]: row[1] for row in evidence if len(row) == 4}
    assert table["3"] == ", ".join(f"{value:.2f}" for value in three) and table["2.5"] == f"{least:.2f}"
