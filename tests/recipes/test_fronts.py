"""A front and a single run in one folder: neither replaces the other unasked, and asked, it leaves nothing of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fliqs_hf.errors import ConfigError
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
        if "bits-5" in str(values[1].path):  # type: ignore[attr-defined]
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
