"""No command replaces what this package did not write, or what a run found; it says so before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fliqs_hf.pipeline import search as searching
from fliqs_hf_cli import main
from tests.helpers.outputs import contents, fill, refused
from tests.helpers.runs import write_run
from tests.recipes.test_vit import write as write_settings

FILES = [
    "config.json", "README.md", "model.safetensors", "preprocessor_config.json", "model-00001-of-00002.safetensors",
    ".lock", ".tmp.config.json", "bits-4/config.json", "bits-4/fliqs/results.json", *(f"fliqs/{name}" for name in (
    "settings.json", "results.json", "allocation.json", "metrics.jsonl", "policy.jsonl", "sensitivity.json",
    "search_space.json", "layers.json", "validation.json", "validation.html", "report.html", "front.csv", "front.png",
    "uniform_int4.json", "written.json", "fp32/config.json",
    "fp32/model.safetensors", "figures/allocation.png", "figures/mine.png", "uniform_int4/model.safetensors",
    "uniform_e2m1/notes.txt", "state/step-00000005/meta.json", "state/best/model.safetensors", "state/notes.txt",
    "fp32-state/step-00000005/model.safetensors", "uniform_int4-state/notes.txt", ".tmp.settings.json",
    ".tmp.written.json", ".tmp.model/config.json", ".old.fp32/model.safetensors",
    )),
]  # fmt: skip


def every_command(fp32: Path, photos: Path, folder: Path, settings: Path) -> list[list[str]]:
    """All that write, with the folder where their results would go."""
    out, search = str(folder), ["search", str(settings), "--output_dir", str(folder)]
    images = ["--dataset_name", str(photos)]
    return [
        ["quantize", str(fp32), out],
        ["quantize", str(fp32), out, "--overwrite"],
        search,
        [*search, "--overwrite_output_dir"],
        [*search, "--resume"],
        [*search, "--overwrite_output_dir", "--target_bits", "4", "5"],
        ["validate", str(fp32), out, *images],
        [
            "validate",
            str(fp32),
            str(fp32),
            *images,
            "--output",
            f"{out}/fliqs/validation.json",
            f"{out}/fliqs/validation.html",
        ],
        ["report", out],
        ["push", out, "user/name"],
        ["compare", str(fp32), *images, "--output", f"{out}/fliqs/front.csv"],
        ["compare", str(fp32), *images, "--output", f"{out}/new.csv"],
    ]


def test_a_folder_of_foreign_files_survives_every_command(
    fp32: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = write_settings(tmp_path, finetune_steps=0, max_steps=2)
    beside = ("new.md", "new.png", "new.multi-trial-random-3-0.jsonl", "notes.txt", "deeper/notes.txt")
    before = fill(tmp_path / "out", *FILES, *beside)
    for arguments in every_command(fp32, photos, tmp_path / "out", settings):
        capsys.readouterr()
        assert main(arguments) in (1, 2), arguments
        assert "Error: " in capsys.readouterr().err
        assert contents(tmp_path / "out") == before, arguments


@pytest.mark.parametrize("name", FILES)
def test_one_foreign_file_is_in_the_way_of_every_run(
    fp32: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In a folder of its own, and in that of a run which has no such file."""
    for out in (tmp_path / "new", shutil.copytree(packed, tmp_path / "run")):
        if out.name == "run" and (
            (out / name).exists() or ("/." in f"/{name}" and name != ".lock")
        ):  # of the run itself
            continue
        before = fill(out, name)
        search = ["search", str(write_settings(tmp_path)), "--output_dir", str(out), "--overwrite_output_dir"]
        targets = ["--target_bits", "4", "5"]
        one_run = [["quantize", str(fp32), str(out), "--overwrite"], search]
        for arguments in ([*search, *targets],) if name.startswith("bits-4") else one_run:
            error = refused(capsys, *arguments)
            assert "written.json" in error or name == ".lock"
            assert "in the way" in error or "no record" in error
            assert contents(out) == before


def test_only_what_is_ours_is_replaced(fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, foreign = tmp_path / "run", ("notes.txt", "data/config.json", "fliqs/uniform_cost.txt", "bits-and-pieces/x")
    fill(out, *foreign)
    assert main(["quantize", str(fp32), str(out)]) == 0
    first = contents(out)
    assert {*json.loads(first["fliqs/written.json"])["written"], "fliqs/written.json", *foreign} == first.keys()
    assert "holds a run already: pass --overwrite" in refused(capsys, "quantize", str(fp32), str(out))
    assert contents(out) == first
    fill(out, "fliqs/figures/mine.png", "fliqs/fp32/notes.txt")
    assert "mine.png is in the way" in refused(capsys, "quantize", str(fp32), str(out), "--overwrite")
    for name in ("fliqs/figures/mine.png", "fliqs/fp32/notes.txt"):
        (out / name).unlink()
    assert main(["quantize", str(fp32), str(out), "--overwrite", "--weight_format", "int4"]) == 0
    second = contents(out)
    assert second.keys() == first.keys()
    assert second["model.safetensors"] != first["model.safetensors"]
    assert all(second[name] == first[name] for name in foreign)


def test_a_run_of_an_earlier_version_stays(fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It had its model in `checkpoint/` and its settings at the top. The model alone goes on being one."""
    out = tmp_path / "run"
    write_run(out / "checkpoint")
    for name in ("written.json", "settings.json"):
        (out / "checkpoint" / "fliqs" / name).unlink()
    (out / "checkpoint" / "fliqs").rename(tmp_path / "rest")
    (out / "config.json").write_text('{"command": "fliqs-hf quantize", "versions": {"fliqs-hf": "0.1.0"}}')
    before = contents(out)
    for overwrite in ([], ["--overwrite"]):
        assert "a run of an earlier version" in refused(capsys, "quantize", str(fp32), str(out), *overwrite)
    for command in (["report", str(out)], ["push", str(out), "user/name"], ["inspect", str(out)]):
        assert main(command) == 1
        assert f"give {out / 'checkpoint'} instead" in capsys.readouterr().err
    assert f"give '{out / 'checkpoint'}'" in refused(capsys, "estimate", str(out))
    assert contents(out) == before
    assert main(["inspect", str(out / "checkpoint")]) == 0


def test_an_unfinished_search_is_not_replaced_by_a_model(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, out = write_settings(tmp_path, finetune_steps=0, max_steps=10), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(searching, "deliver", None)
        assert main(["search", str(settings)]) == 2
    before = contents(out)
    assert "fliqs/state/step-00000010/meta.json" in before and "fliqs/results.json" not in before
    assert not {"config.json", "model.safetensors"} & before.keys()
    assert "holds a run already" in refused(capsys, "quantize", str(fp32), str(out))
    assert contents(out) == before
    assert main(["quantize", str(fp32), str(out), "--overwrite"]) == 0
    assert not (out / "fliqs/state").exists() and not (out / "fliqs/search_space.json").exists()


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("where", [
    lambda m, tmp: m,
    lambda m, tmp: m / "sub",
    lambda m, tmp: m.parent,
    lambda m, tmp: tmp,
    lambda m, tmp: link(tmp / "link", m),
    lambda m, tmp: link(tmp / "link", m) / "sub",
    lambda m, tmp: link(tmp / "link", m.parent),
    lambda m, tmp: Path(os.path.relpath(m)),
    lambda m, tmp: m / ".." / "fp32",
], ids=["same", "inside", "run", "above", "link", "in a link", "link to the run", "relative", "dots"])  # fmt: skip
def test_an_output_is_apart_from_its_sources(
    fp32: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: Callable[..., Path]
) -> None:
    """The model is that of a run, such as runs/a/fp32; the images stand beside it."""
    model = shutil.copytree(fp32, tmp_path / "runs" / "a" / "fp32")
    images = shutil.copytree(photos, tmp_path / "images" / "b" / "fp32")
    before = contents(tmp_path)
    for source, quantize, search in (
        (model, [str(model)], ["--model_name_or_path", str(model), "--dataset_name", "digits"]),
        (images, [str(fp32), "--calibration", str(images)], ["--model_type", "vit", "--dataset_name", str(images)]),
        (images, None, ["--model_type", "vit", "--train_dir", str(images)]),
        (images, None, ["--model_type", "vit", "--train_dir", str(photos), "--validation_dir", str(images)]),
    ):
        out = str(where(source, tmp_path))
        commands = [["search", *search, "--output_dir", out, "--overwrite_output_dir"]]
        if quantize is not None:
            commands.append(["quantize", quantize[0], out, *quantize[1:], "--overwrite"])
        for arguments in commands:
            assert "which is only read: choose another output" in refused(capsys, *arguments), arguments
        (tmp_path / "link").unlink(missing_ok=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["", "  ", "a\0b"])
def test_an_output_has_a_name(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["quantize", str(fp32), name], ["search", "--output_dir", name, "--dataset_name", "digits"]):
        assert re.search("is empty|holds a zero byte", refused(capsys, *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["{tmp}/file/run", "/proc/run", "{tmp}/dangling", "{tmp}/file", "{tmp}/" + 300 * "x"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    before = fill(tmp_path, "file")
    link(tmp_path / "dangling", tmp_path / "nowhere")
    monkeypatch.setattr(searching, "load", None)
    monkeypatch.setattr("fliqs_hf.cli.quantize.read_config", None)
    out = out.format(tmp=tmp_path)
    for arguments in (["quantize", str(fp32), out], ["search", "digits", "--output_dir", out]):
        assert out in refused(capsys, *arguments)
    (tmp_path / "dangling").unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("out", ["new/deep", "new"])
def test_nothing_is_made_for_a_command_that_fails(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    refused(capsys, "quantize", str(fp32), str(tmp_path / out), "--weight_format", "int99x")
    refused(capsys, "search", "--output_dir", str(tmp_path / out), "--dataset_name", str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [
    "fliqs", "fliqs/figures", "fliqs/fp32", "fliqs/state", "config.json", "fliqs/results.json", "bits-4",
])  # fmt: skip
def test_links_are_not_followed(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], packed: Path, name: str
) -> None:
    """Such as weights that were moved to another disk."""
    run, settings = shutil.copytree(packed, tmp_path / "run"), str(write_settings(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    if (run / name).exists():
        (run / name).rename(elsewhere)
    else:
        shutil.copytree(packed, elsewhere)
    link(run / name, elsewhere)
    before = contents(tmp_path)
    for arguments in (
        ["quantize", str(fp32), str(run), "--overwrite"],
        ["search", settings, "--target_bits", "4", "5", "--overwrite_output_dir"],
    ):
        assert f"{run / name} is in the way" in refused(capsys, *arguments)
        assert contents(tmp_path) == before
