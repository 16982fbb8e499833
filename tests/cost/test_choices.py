"""What is chosen from by default: on every known hardware something that runs there, and nothing that runs nowhere."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import pytest

from fliqs_hf.allocation import LayerFormats
from fliqs_hf.cli.targets import settle
from fliqs_hf.cost import hardware
from fliqs_hf.cost.choices import choices
from fliqs_hf.cost.hardware import load_profile, profile_names
from fliqs_hf.cost.latency import BETWEEN, LatencyRow, LatencyTable
from fliqs_hf.errors import ConfigError, FormatError
from fliqs_hf.formats.spaces import SPACES


def names(*arguments: Any) -> list[str]:
    return [fmt.name for fmt in choices(*arguments).formats]


def test_by_hand() -> None:
    codes = ["int4", "e2m1", "e2m3", "int8"]
    for cpu in ("x86-vnni", "x86-amx", "arm-dotprod", "onnxruntime-cpu", "openvino-cpu"):
        assert names(None, cpu) == codes
    assert names(None, "x86-avx2") == ["int4", "e2m1", "e2m3", "int7"]  # INT8 weights are not summed exactly there
    assert names(None, "a100") == codes
    assert names(None, "h100") == ["int4", "e2m1", "e2m3", "e3m2", "int8", "e4m3", "e5m2"]
    assert {"mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3"} <= set(names(None, "b200"))
    assert choices(None, "x86-amx").activation == "separate"  # every pair as 8-bit integers: W4A8
    assert choices(None, "h100").activation == "same"  # INT8 × E4M3 would run as BF16


@pytest.mark.parametrize("name", profile_names())
def test_every_default_runs_there_and_somewhere_as_it_is(name: str) -> None:
    profile, found = load_profile(name), choices(None, name)
    pairs = [(fmt, fmt) for fmt in found.formats]
    if found.activation == "separate":
        pairs = list(itertools.product(found.formats, repeat=2))
    assert all(profile.runs(LayerFormats(*pair)).state != "simulated" for pair in pairs)
    for fmt in found.formats:
        somewhere = any(
            fmt in pair.weights or fmt in pair.inputs
            for other in map(load_profile, profile_names())
            for pair in other.pairs
        )
        assert somewhere or (name, fmt.name) == ("x86-avx2", "int7")
        assert fmt.bits <= 8


def test_mixed_is_one_word_away() -> None:
    found = choices("mixed")
    assert tuple(fmt.name for fmt in found.formats) == SPACES["mixed"]
    assert (found.activation, found.profile, found.hardware) == ("same", None, None)
    assert choices("mixed", named="separate").activation == "separate"
    assert "e3m3" not in names("mixed", "x86-vnni") and "int3" in names("mixed", "x86-vnni")
    assert choices("mixed", "auto").hardware == "x86-vnni"


def test_the_default_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choices().hardware == "x86-vnni" and names() == names(None, "x86-vnni")
    monkeypatch.setattr(hardware, "detected", lambda: "h100")
    assert choices().hardware == "h100" and names() == names(None, "h100")
    file = tmp_path / "mine.yaml"
    file.write_text("title: mine\nsource: me\npairs:\n  - {weights: [int5], inputs: [int8]}\nfallback: slow\n")
    assert choices(None, str(file)).hardware == str(file)
    assert names(None, str(file)) == ["int4", "e2m1", "int5"]  # INT8 is no weight there, and E2M3 times 8 has 60
    file.write_text("title: mine\nsource: me\npairs:\n  - {weights: [bf16], inputs: [bf16]}\nfallback: slow\n")
    with pytest.raises(ConfigError, match=r"mine runs no format of at most 8 bits .*: name formats with search_space"):
        choices(None, str(file))
    with pytest.raises(FormatError, match="nonsense"):
        choices("nonsense")


def test_a_latency_table_narrows_the_default(tmp_path: Path) -> None:
    def settled(*pairs: tuple[str, str], **given: Any) -> argparse.Namespace:
        rows = [LatencyRow(BETWEEN, "fp32", "fp32", 0, 0, 0), *(LatencyRow("a", *pair, 1, 1, 1) for pair in pairs)]
        LatencyTable(tuple(rows), {}).save(tmp_path / "times.json")
        args = {"search_space": None, "hardware": None, "activation": None, "calibration": None, **given}
        space = argparse.Namespace(**args, latency_table=str(tmp_path / "times.json"))
        settle(space, "separate")
        return space

    some = settled(("int4", "int4"), ("int8", "int8"), ("int3", "int3"))
    assert (some.search_space, some.activation) == (["int4", "int8"], "same")
    every = settled(*itertools.product(("int4", "int8"), repeat=2))
    assert (every.search_space, every.activation) == (["int4", "int8"], "separate")
    with pytest.raises(ConfigError, match="lacks times of some pairs of int4, int8: leave --activation separate out"):
        settled(("int4", "int4"), ("int8", "int8"), activation="separate")
    with pytest.raises(ConfigError, match="has no times of int4, e2m1, e2m3, int8"):
        settled(("int3", "int3"))
    assert settled(("int3", "int3"), search_space=["int3", "int5"]).search_space == ["int3", "int5"]
