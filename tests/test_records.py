"""Records of runs: read back as they were written, of versions that are known, with values of their types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf import checksums
from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.publication import PUBLISHED
from fliqs_hf.records import MeasuredAlternatives, PolicyStep, Record, RunResults, RunSettings, SensitivityScores
from fliqs_hf.runs import FinishedRun, RunFolder
from fliqs_hf.runs.files import FILES
from tests.helpers.runs import change, write_run

RECORDS: list[Record] = [
    RunSettings(arguments={"seed": 3, "dataset_name": None}, search={"band": 0.01}, command="x", versions={"a": "1"}),
    RunSettings(arguments={"calibration": "photos"}, command=["fliqs-hf", "quantize"]),
    RunResults(target={"bits": 4.0, "cap": None}, cost={"bops": 1e9}, accuracy={"fp32": {"top1": 0.5}}, repaired=True),
    SensitivityScores(method="fisher", images=8, passes=2, seconds=0.5, scores={"a": [0.0, 1.5]}),
    MeasuredAlternatives(
        images=8,
        seconds=0.5,
        changes={"a": {"int4": {"value": 0.5, "low": -1.0, "high": 2.0, "known": False}}, "b": {}},
    ),
    PolicyStep(step=10, probabilities={"a": [0.25, 0.75]}),
]
#: As folders have them that were written before there was a version.
EARLIER: list[tuple[type[Record], dict[str, Any]]] = [
    (RunSettings, {"seed": 3, "search": {"band": 0.01}, "command": "x", "versions": {"torch": "2"}}),
    (RunResults, {"target": {}, "cost": {}, "fp32_bytes": 3, "checkpoint_bytes": 2}),
    (SensitivityScores, {"method": "fisher", "images": 8, "passes": 1, "seconds": 1, "scores": {"a": [1, 2]}}),
    (PolicyStep, {"step": 1, "probabilities": {}}),
]


def test_every_record_is_known_as_ours_and_published() -> None:
    names = {record.name for record in Record.__subclasses__()}
    assert names == {record.name for record in RECORDS}
    assert names <= set(FILES) and names <= set(PUBLISHED)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_written_is_read(record: Record) -> None:
    stored = json.loads(json.dumps(record.to_dict()))
    assert stored["format_version"] == 1
    assert type(record).of(stored, "x") == record
    assert type(record).of(checksums.sealed(stored), "x") == record


@pytest.mark.parametrize(("record", "data"), EARLIER)
def test_records_without_a_version_are_of_the_first(record: type[Record], data: dict[str, Any]) -> None:
    found = record.of(data, "x").to_dict()
    assert {key: found[key] for key in data} == data


@pytest.mark.parametrize("version", [2, 0, -1, "1", 1.0, True, None, [1]])
@pytest.mark.parametrize(("record", "data"), EARLIER)
def test_other_versions_are_refused(record: type[Record], data: dict[str, Any], version: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the file has format_version=.*update fliqs_hf"):
        record.of({**data, "format_version": version}, "the file")


@pytest.mark.parametrize(("record", "changes", "named"), [
    (RunSettings, {"search": 3}, "search=3"),
    (RunSettings, {"versions": {"torch": 2}}, "versions="),
    (RunSettings, {"command": {}}, "command="),
    (RunResults, {"cost": [1]}, "cost="),
    (RunResults, {"cost": {"bops": "many"}}, "cost="),
    (RunResults, {"accuracy": None}, "accuracy=None"),
    (RunResults, {"repaired": 1}, "repaired=1"),
    (RunResults, {"fp32_bytes": 1.5}, r"fp32_bytes=1\.5"),
    (RunResults, {"note": "x"}, "an entry 'note'"),
    (SensitivityScores, {"scores": {"a": [float("nan")]}}, "scores="),
    (SensitivityScores, {"scores": {"a": "high"}}, "scores="),
    (SensitivityScores, {"images": True}, "images=True"),
    (PolicyStep, {"step": "1"}, "step='1'"),
    (PolicyStep, {"probabilities": {"a": 0.5}}, "probabilities="),
])  # fmt: skip
def test_values_of_another_type_are_refused(record: type[Record], changes: dict[str, Any], named: str) -> None:
    data = dict(EARLIER)[record]
    with pytest.raises(CheckpointError, match=f"^the file .*{named}"):
        record.of({**data, **changes}, "the file")


def test_an_entry_that_is_missing_is_named() -> None:
    with pytest.raises(CheckpointError, match="step"):
        PolicyStep.of({"probabilities": {}}, "x")


def test_a_folder_has_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.read_record(RunResults) is None
    results = RunResults(target={"bits": 4.0}, seconds=2.5)
    run.write_record(results, sealed=True)
    assert run.read_record(RunResults) == results == RunResults.read(run.records)
    change(run.records / "results.json", seconds=3.5)
    assert RunResults.read(run.records) == RunResults(target={"bits": 4.0}, seconds=3.5)
    with pytest.raises(CheckpointError, match="not what was written"):  # what is resumed from must be
        run.read_record(RunResults)


@pytest.mark.parametrize("name", ["settings.json", "results.json"])
def test_a_run_of_a_later_version_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path)
    assert FinishedRun.read(tmp_path).settings.arguments["preset"] == "default"
    change(tmp_path / "fliqs" / name, format_version=7)
    with pytest.raises(CheckpointError, match=rf"{name} has format_version=7"):
        FinishedRun.read(tmp_path)
