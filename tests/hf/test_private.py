"""No path of this machine leaves it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.card import model_card
from fliqs_hf.hf.hub import push
from fliqs_hf.hf.private import command_line, last_part, published_json, published_page, without_paths, without_private
from fliqs_hf.report.run_report import write_report
from tests.helpers.hub_server import HubServer
from tests.helpers.runs import change, write, write_run


@pytest.mark.parametrize(("text", "shown"), [
    ("/srv/bob/models/deit", "deit"),
    ("/srv/bob/my photos/cats", "cats"),
    ("~/models/deit/", "deit"),
    ("~bob/deit", "deit"),
    ("../acme/secret", "secret"),
    ("./run", "run"),
    ("runs/acme/pilot", "pilot"),
    ("$HOME/x/y", "y"),
    ("${HOME}/x/y", "y"),
    ("C:\\Data\\bob\\deit", "deit"),
    ("C:/Data/bob/deit", "deit"),
    ("..\\acme\\deit", "deit"),
    ("%TEMP%\\acme\\deit", "deit"),
    ("\\\\server\\acme\\deit", "deit"),
    ("file:///srv/bob/deit", "deit"),
    ("cannot open '/srv/bob/my photos/x.png': truncated", "cannot open 'x.png': truncated"),
    ("cannot open /srv/bob/x.png (errno 2), ../y/z.png", "cannot open x.png (errno 2), z.png"),
    ("PATH=/usr/bob/bin:/opt/acme/bin", "PATH=bin:bin"),
    ("see C:\\Data\\bob\\m.txt now", "see m.txt now"),
])  # fmt: skip
def test_paths_are_reduced_to_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown


@pytest.mark.parametrize("text", [
    "google/vit-tiny", "https://hub/user/model", "s3://bucket/a/b", "hf://datasets/a/b", "W int4 / A int8", "and/or",
    "2 / 3", "image/jpeg", r"re:.*\.(q|k)_proj", r"re:vit\.layers\.\d+", r"vit\.layers", "a.{q,k}", "", ".", "..", "/",
    "Linux-6.1-x86_64-with-glibc2.36", "2.13.0+cpu",
])  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert without_paths(text) == text


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`acme/photos` may be an id on the Hub; where there is such a folder, it is not."""
    monkeypatch.chdir(tmp_path)
    assert without_paths("acme/photos") == last_part("acme/photos") == "acme/photos"
    (tmp_path / "acme" / "photos").mkdir(parents=True)
    assert without_paths("acme/photos") == last_part("acme/photos") == "photos"


def test_command_lines_stay_command_lines() -> None:
    line = "/opt/venv/bin/fliqs-hf quantize /srv/bob/deit '../out dir' --calibration=/data/acme/photos --seed 3"
    assert command_line(line) == "fliqs-hf quantize deit 'out dir' --calibration=photos --seed 3"
    assert command_line(line.split()[:3]) == "fliqs-hf quantize deit"
    assert command_line("broken ' /srv/bob/deit") == "broken ' deit"


def test_records_keep_names_of_classes_and_formats() -> None:
    names: dict[str, Any] = {
        "class_names": ["/m/01g317"],
        "id2label": {"0": "/m/01"},
        "quantization_config": {"x": "/a/b"},
    }
    assert without_private({**names, "a": ["/srv/bob/x", 1, None], "/srv/bob/metric.py": 2}) == {
        **names, "a": ["x", 1, None], "metric.py": 2,
    }  # fmt: skip
    untouched = '{"a":   1}\n{"b": [2]}\n'
    assert published_json(untouched) == untouched
    assert published_json('{"a": 1}\n{"b": "/srv/bob/x"}\n') == '{"a": 1}\n{"b": "x"}\n'


def test_an_older_page_is_cleaned(tmp_path: Path) -> None:
    records = [{"model": "/srv/acme & sons/deit", "short": "/a", "win": "C:\\acme\\x"}]
    here = tmp_path / "run"
    page = f"<a>/a</a><pre>/srv/acme &amp; sons/deit C:\\\\acme\\\\x {here}/figures</pre><p>{Path.home()}/x/y 1/a</p>"
    assert published_page(page, records, here) == "<a>a</a><pre>deit x figures</pre><p>y 1/a</p>"


@pytest.fixture
def private_run(tmp_path: Path) -> Path:
    """A run of which every record names places of this machine."""
    run = tmp_path / "acme-secret" / "pilot"
    run.mkdir(parents=True)
    write_run(run)
    home, temp = str(Path.home()), tempfile.gettempdir()
    change(
        run / "fliqs/settings.json",
        model_name_or_path=f"{home}/acme-secret/deit",
        dataset_name="../acme-secret/photos",
        train_dir="C:\\acme-secret\\photos",
        output_dir=str(run),
        allocation="~/acme-secret/allocation.json",
        note=f"tried {temp}/acme-secret/x.png first",
        command=f"/opt/acme-secret/fliqs-hf quantize {home}/acme-secret/deit '{run}' --calibration=../acme-secret/p",
    )
    results = json.loads((run / "fliqs/results.json").read_text())
    results["accuracy"]["fp32"]["metrics"] = {f"{home}/acme-secret/metric.py": 0.5}
    write(run / "fliqs/results.json", results)
    (run / "fliqs/metrics.jsonl").write_text(
        '{"step": 0, "loss": 2.3}\n' + json.dumps({"step": 1, "error": f"no file {temp}/acme-secret/a.png"}) + "\n"
    )
    change(run / "config.json", _name_or_path=f"{temp}/acme-secret/deit")
    change(run / "preprocessor_config.json", name_or_path=f"{home}/acme-secret/deit")
    return run


@pytest.mark.parametrize("fresh", [True, False], ids=["report of today", "older report"])
def test_nothing_that_is_published_names_a_place_of_this_machine(
    hub: HubServer,
    private_run: Path,
    fresh: bool,
) -> None:
    settings = json.loads((private_run / "fliqs/settings.json").read_text())
    if fresh:
        write_report(private_run)
        assert "acme-secret" not in (private_run / "fliqs/report.html").read_text()
    else:
        shown = escape(f"{settings['command']}\n{json.dumps(settings, indent=2)}")
        (private_run / "fliqs/report.html").write_text(f"<p>{private_run}/x</p><pre>{shown}</pre>")
    push(private_run, "user/small")
    files = hub.repos["user/small"].files()
    assert len(files) > 12
    for name, content in files.items():
        for place in ("acme-secret", str(Path.home()) + "/", str(private_run.parent)):
            assert place.encode() not in content, (name, place)
    card = files["README.md"].decode()
    assert "fliqs-hf quantize deit pilot --calibration=p" in card
    assert "`deit` (a local checkpoint)" in card
    assert json.loads(files["fliqs/results.json"])["accuracy"]["fp32"]["metrics"] == {"metric.py": 0.5}
    assert json.loads(files["fliqs/settings.json"])["seed"] == 0


def test_a_setting_of_the_model_that_is_a_path_is_refused(hub: HubServer, tmp_path: Path) -> None:
    """It is bound to the weights, so it cannot be changed on the way."""
    write_run(tmp_path)
    change(tmp_path / "config.json", train_dir="/srv/bob/photos")
    with pytest.raises(CheckpointError, match="'train_dir' of the model holds a path"):
        push(tmp_path, "user/small")
    assert "user/small" not in hub.repos


def test_the_card_alone_names_no_place(private_run: Path) -> None:
    assert "acme-secret" not in str(model_card(private_run))
