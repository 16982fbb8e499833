"""A front and a single run in one folder: neither replaces the other unasked, and asked, it leaves nothing of it. And
fronts whose searches start from one another."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.nn import restore
from fliqs_hf.pipeline import search as recipe
from fliqs_hf.pipeline.search import main
from tests.cli.test_outputs import contents, fill
from tests.recipes.test_vit import write

FRONT = ["--target_bits", "3", "5"]
SHORT = {"finetune_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    main([str(write(folder, **SHORT)), *FRONT])
    return folder / "run"


def test_a_finished_front_is_not_replaced_unasked(front: Path, tmp_path: Path) -> None:
    run = shutil.copytree(front, tmp_path / "run")
    before = contents(run)
    for targets in (["4"], ["3"], ["3", "5"], ["3", "6"], ["4", "6"]):
        with pytest.raises(ConfigError, match="holds a run already: add --resume"):
            main([str(write(tmp_path, **SHORT)), "--target_bits", *targets])
        assert contents(run) == before
    main([str(write(tmp_path, **SHORT)), *FRONT, "--resume"])
    after = contents(run)
    assert {name for name in before if after[name] != before[name]} <= {
        "fliqs/settings.json", "fliqs/front.png", *reports(before),
    }  # fmt: skip


def reports(names: dict[str, bytes]) -> set[str]:
    return {name for name in names if name.endswith(("report.html", "README.md", ".png"))}


def test_a_front_that_is_replaced_goes_whole(front: Path, tmp_path: Path) -> None:
    """But for what is not ours; a record in it is not mistaken for one of the new run."""
    run = shutil.copytree(front, tmp_path / "run")
    foreign = ("notes.txt", "bits-3/notes.txt", "bits-9/notes.txt")
    before = fill(run, *foreign)
    main([str(write(tmp_path, **SHORT | {"finetune_steps": 0})), "--target_bits", "4", "--overwrite_output_dir"])
    after = contents(run)
    assert not {"fliqs/front.csv", "fliqs/front.png", "fliqs/fp32/model.safetensors"} & after.keys()
    assert [name for name in after if name.startswith("bits-")] == sorted(foreign[1:])
    assert all(after[name] == before[name] for name in foreign)
    assert "fliqs/results.json" in after and "config.json" in after and not (run / "bits-5").exists()


def test_a_single_run_gives_way_to_a_front_only_when_asked(tmp_path: Path) -> None:
    run, file = tmp_path / "run", str(write(tmp_path, **SHORT))
    main([file])
    before = fill(run, "notes.txt")
    with pytest.raises(ConfigError, match="holds a run already"):
        main([file, *FRONT])
    assert contents(run) == before
    main([file, *FRONT, "--overwrite_output_dir"])
    after = contents(run)
    assert {name for name in after if "/" not in name} == {"notes.txt"}
    assert {"fliqs/front.csv", "bits-3/config.json"} <= after.keys() and "fliqs/results.json" not in after


def test_an_unfinished_front_is_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first target is done, its second was stopped; a single run would have cleared the fine-tuned model."""
    original = recipe.search_for

    def first_only(*values: object) -> object:
        if "bits-5" in str(values[0].path):  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(*values)  # type: ignore[arg-type]

    monkeypatch.setattr(recipe, "search_for", first_only)
    file = str(write(tmp_path, **SHORT))
    with pytest.raises(KeyboardInterrupt):
        main([file, *FRONT])
    before = contents(tmp_path / "run")
    assert "bits-3/fliqs/results.json" in before and "fliqs/front.csv" not in before
    with pytest.raises(ConfigError, match="holds a run already"):
        main([file])
    assert contents(tmp_path / "run") == before


def test_targets_do_not_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"target_bits has .bits-3. more than once"):
        main([str(write(tmp_path, **SHORT)), "--target_bits", "3", "3.0000001"])
    assert not (tmp_path / "run").exists()


RESULT_FILES = ("model.safetensors", "fliqs/allocation.json")


def warm(folder: Path, *options: str) -> list[Path]:
    """Results of a front whose searches start from one another."""
    folder.mkdir(exist_ok=True)
    main([str(write(folder, **SHORT | {"warm_start": True})), *FRONT, *options])
    return [folder / "run" / name / file for name in ("bits-5", "bits-3") for file in RESULT_FILES]


def test_searches_start_from_the_next_dearer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of their cost, from its weights before they were rounded, of which nothing is left at the end."""
    sources: list[Any] = []
    trained: list[dict[str, Any]] = []
    original = recipe.train_formats

    def recorded(*values: Any, source: Any = None) -> Any:
        sources.append((values[5], None if source is None else copy.deepcopy(source.state_dict())))
        model = original(*values, source=source)
        plain = copy.deepcopy(model)
        restore(plain)
        trained.append(plain.state_dict())
        return model

    monkeypatch.setattr(recipe, "train_formats", recorded)
    warm(tmp_path)
    assert [name for name, _ in sources] == ["search for bits 5", "search for bits 3"] and sources[0][1] is None
    assert sources[1][1].keys() == trained[0].keys()
    assert all(torch.equal(sources[1][1][name], trained[0][name]) for name in trained[0])
    assert not list((tmp_path / "run").rglob("latent*"))
    assert len((tmp_path / "run" / "fliqs/front.csv").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("stopped", ["search for bits 5", "search for bits 3"])
def test_a_stopped_warm_front_resumes_to_the_same_bits(
    stopped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [file.read_bytes() for file in warm(tmp_path / "whole")]
    original = recipe.deliver

    def stop(job: Any, run: Any, *values: Any) -> Any:  # after the training, before there is a result
        if run.path.name == stopped.replace("search for bits ", "bits-"):
            raise KeyboardInterrupt
        return original(job, run, *values)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "deliver", stop)
        with pytest.raises(KeyboardInterrupt):
            warm(tmp_path / "stopped")
    assert [file.read_bytes() for file in warm(tmp_path / "stopped", "--resume")] == expected


def test_a_warm_start_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="warm_start needs several targets"):
        main([str(write(tmp_path, **SHORT)), "--target_bits", "3", "--warm_start", "true"])
    original = recipe.search_for

    def first_only(run: Any, *values: Any) -> Any:
        if run.path.name == "bits-3":
            raise KeyboardInterrupt
        return original(run, *values)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "search_for", first_only)
        with pytest.raises(KeyboardInterrupt):
            warm(tmp_path)
    shutil.rmtree(tmp_path / "run" / "bits-5/fliqs/latent")
    with pytest.raises(CheckpointError, match=r"latent is missing - the next search starts from these weights"):
        warm(tmp_path, "--resume")
