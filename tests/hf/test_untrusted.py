"""Nothing in a checkpoint is opened, run or followed out of its folder, and records of any content end in an error."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, quantize
from fliqs_hf.errors import AllocationError, CheckpointError, ConfigError, FliqsError
from fliqs_hf.hf.quantizer import _align
from fliqs_hf.json_file import MAX_DEPTH, read_json, read_objects, read_text
from fliqs_hf.report.run_report import RunReport
from fliqs_hf.runs.finished import FinishedRun
from tests.helpers.models import tiny
from tests.helpers.runs import write_run

NESTED = "[" * 100_000 + "]" * 100_000
EVIL = "re:(a|a)*b" + "a" * 30


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_an_allocation_in_a_checkpoint_is_no_path(tmp_path: Path) -> None:
    model = quantize(tiny("vit"), FLIQSConfig())
    model.save_pretrained(tmp_path / "packed")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "secret.json").write_text('{"password": 1}')
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path / "secret.json"), ["x"], 5):
        edit(tmp_path / "packed/config.json", lambda c: c["quantization_config"].update(allocation=path))  # noqa: B023
        with pytest.raises(AllocationError, match="stored in a checkpoint") as caught:
            AutoModelForImageClassification.from_pretrained(tmp_path / "packed")
        assert "password" not in str(caught.value)


def test_an_allocation_that_a_user_names_is_a_regular_file(tmp_path: Path) -> None:
    Allocation.uniform(["classifier"], "int4").save(tmp_path / "allocation.json")
    assert list(FLIQSConfig(allocation=tmp_path / "allocation.json").allocation) == ["classifier"]
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(AllocationError, match="no regular file"):
            FLIQSConfig(allocation=path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"modules_to_not_convert": [EVIL]}, "no regular expression"),
        ({"overrides": {EVIL: "int4"}}, "no regular expression"),
        ({"modules_to_not_convert": ["*a" * 50]}, "no regular expression"),
        ({"modules_to_not_convert": "classifier"}, "wrong type"),
        ({"modules_to_not_convert": [5]}, "no name"),
        ({"overrides": ["x"]}, "wrong type"),
        ({"weight_format": "int" + "9" * 5000}, "characters"),
        ({"allocation": {"x" * 1000: {"weight": "int4", "activation": None}}}, "at most 500"),
        ({"weight_granularity": ["per_channel"]}, "weight_granularity"),
        ({"digests": {"tensors": {}}}, "digests"),
        ({"digests": {"tensors": {"x": 5}, "settings": {}}}, "digests"),
        ({"format_version": 1, "digests": {"tensors": {}, "settings": {}}}, "format_version=1"),
    ],
)
def test_a_stored_configuration_is_bounded(values: dict[str, Any], named: str) -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match=named):
        FLIQSConfig.from_dict({"quant_method": "fliqs", **values})
    assert time.process_time() - start < 5  # the expression above would take years


@pytest.mark.parametrize("place", ["../other/model.safetensors", "{root}/other/model.safetensors", "/dev/zero", 5, ""])
def test_the_index_does_not_lead_out_of_the_folder(place: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(tmp_path / "run", shard_size="5KB")
    write_run(tmp_path / "other")
    place = str(place).format(root=tmp_path) if isinstance(place, str) else place
    edit(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({"classifier.bias": place}))
    with pytest.raises(CheckpointError, match="beside it"):
        FinishedRun.read(tmp_path / "run")
    with pytest.raises((FliqsError, OSError, TypeError)):
        AutoModelForImageClassification.from_pretrained(folder)


def test_all_of_an_index_outside(tmp_path: Path) -> None:
    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path / "a", max_shard_size="5KB")
    quantize(tiny("vit"), FLIQSConfig()).save_pretrained(tmp_path / "b")
    outside = str(tmp_path / "b" / "model.safetensors")
    for place in (outside, "../b/model.safetensors"):
        edit(
            tmp_path / "a/model.safetensors.index.json",
            lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], place)),  # noqa: B023
        )
        with pytest.raises(CheckpointError, match="not in its folder"):
            AutoModelForImageClassification.from_pretrained(tmp_path / "a")


def test_a_pipe_in_place_of_weights(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        FinishedRun.read(tmp_path)


@pytest.mark.parametrize("content", [NESTED, '{"a":' * 5000 + "1" + "}" * 5000, "\xff", "{", '"text"', ""])
@pytest.mark.parametrize(
    "record",
    [
        "config.json", *(f"fliqs/{name}" for name in (
            "allocation.json", "results.json", "validation.json", "settings.json", "layers.json", "search_space.json",
            "sensitivity.json", "policy.jsonl", "metrics.jsonl",
        )),
    ],
)  # fmt: skip
def test_records_of_any_content(record: str, content: str, run: Path) -> None:
    whole = (run / record).read_bytes() if (run / record).exists() else None
    (run / record).write_bytes(content.encode("latin-1"))
    try:
        if record.endswith(".jsonl") and not content:  # an empty record, which is none
            RunReport.read(run)
            return
        with pytest.raises(FliqsError, match=Path(record).name):
            RunReport.read(run)
    finally:
        (run / record).unlink() if whole is None else (run / record).write_bytes(whole)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    return folder


def test_depth_is_counted(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert read_json(tmp_path / "deep.json")
    (tmp_path / "deep.json").write_text('{"a":[' * MAX_DEPTH + "]}" * MAX_DEPTH)
    with pytest.raises(CheckpointError, match="deeper"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "lines.jsonl").write_text('{"a": 1}\n5\n')
    with pytest.raises(CheckpointError, match="not an object"):
        read_objects(tmp_path / "lines.jsonl")


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fliqs_hf.json_file.MAX_BYTES", 10)
    (tmp_path / "x.json").write_text("[1, 2, 3, 4]")
    with pytest.raises(CheckpointError, match="12 bytes are more than 10"):
        read_text(tmp_path / "x.json")


def test_tensors_of_a_loaded_model_are_aligned(tmp_path: Path) -> None:
    """Kernels may sum unaligned tensors in another order, which changes bits; a mapped file aligns to 8 bytes."""
    quantize(tiny("vit"), FLIQSConfig(weight_format="int3")).save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert [name for name, tensor in model.state_dict().items() if tensor.data_ptr() % 64] == []
    bias = torch.arange(33.0)[1:]
    assert bias.data_ptr() % 64
    model.vit.layernorm.bias.data = bias
    _align(model)
    assert model.vit.layernorm.bias.data_ptr() % 64 == 0 and torch.equal(model.vit.layernorm.bias, bias)
