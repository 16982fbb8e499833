"""Hardware profiles: their schema, what runs on them, and that those of CPUs agree with the choice of kernels."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import ViTImageProcessorPil as ViTImageProcessor

import fliqs_hf_cli
from fliqs_hf import Allocation, LayerFormats, quantize
from fliqs_hf.cost import LayerInfo, trace_layers
from fliqs_hf.cost import hardware as module
from fliqs_hf.cost.hardware import fits, load_profile, native_share, profile_names, restricted, run_anywhere
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import parse
from fliqs_hf.formats.spaces import SPACES
from fliqs_hf.nn import packed_layers
from fliqs_hf.nn.native.choice import choose
from fliqs_hf.nn.native.int8 import largest_exact_weight
from tests.helpers.models import tiny
from tests.helpers.runs import write_run

VALID = "title: mine\nsource: https://example.org\nfallback: slow\npairs:\n  - {weights: [int4], inputs: [int8]}\n"


@pytest.mark.parametrize("name", profile_names())
def test_profiles_of_the_package(name: str) -> None:
    profile = load_profile(name)
    assert profile.source.startswith("https://") and profile.title and profile.fallback
    whole = "int7" if name == "x86-avx2" else "int8"  # which every one of them runs
    assert profile.runs(LayerFormats.of(whole, whole)).state == ("carried" if name == "x86-avx2" else "native")


def test_every_profile_that_is_promised_is_there() -> None:
    assert {
        "x86-avx2", "x86-vnni", "x86-amx", "arm-dotprod", "a100", "l40s", "h100", "b200", "mi300x", "apple",
        "edge-npu",
        "onnxruntime-cpu", "openvino-cpu", "tensorrt",
    } <= set(profile_names())  # fmt: skip


@pytest.mark.skipif(not largest_exact_weight(), reason="no int8 kernel on this CPU")
def test_the_profile_of_this_cpu_agrees_with_the_choice_of_kernels(
    monkeypatch: pytest.MonkeyPatch, detected: Callable[[], str]
) -> None:
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    profile = load_profile(detected())
    assert profile.largest_weight_code == largest_exact_weight()
    # Without what has no kernel here: BF16 by AMX, which is what the instructions can do.
    profile = dataclasses.replace(profile, pairs=())
    for weight, activation in itertools.product((*SPACES["mixed"], "bf16"), (*SPACES["mixed"], "bf16", None)):
        formats = LayerFormats.of(weight, activation)
        (layer,) = packed_layers(quantize(tiny("vit"), Allocation({"classifier": formats}))).values()
        assert (choose(layer).kernel == "int8") == (profile.runs(formats).state != "simulated"), formats


def test_what_fits() -> None:
    yes = [("int4", "int8"), ("e2m1", "int8"), ("e2m3", "e4m3"), ("e3m2", "e4m3"), ("int5", "e4m3"), ("e4m3", "bf16")]
    no = [("int8", "e4m3"), ("e4m3", "int8"), ("int6", "e4m3"), ("int8", "int4"), ("e5m2", "e4m3"), ("bf16", "int8")]
    assert [pair for pair in yes if not fits(*map(parse, pair))] == []
    assert [pair for pair in no if fits(*map(parse, pair))] == []


def test_native_carried_simulated_nowhere() -> None:
    h100, a100 = load_profile("h100"), load_profile("a100")
    states = {
        ("int4", "int4"): ("carried", "native"),
        ("e4m3", "e4m3"): ("native", "carried"),  # in BF16 there
        ("e2m1", "e4m3"): ("carried", "carried"),
        ("int8", "int4"): ("carried", "carried"),
        ("int12", "int12"): ("simulated", "simulated"),
        ("int8", None): ("simulated", "simulated"),
    }
    for pair, expected in states.items():
        formats = LayerFormats.of(*pair)
        assert (h100.runs(formats).state, a100.runs(formats).state) == expected, pair
    assert run_anywhere(LayerFormats.of("int4", "int16")) and not run_anywhere(LayerFormats.of("int12", "int12"))
    assert h100.runs(LayerFormats.of("int4", "int4")).reason == "as int8 × int8, exactly and at their cost"


@pytest.mark.parametrize(("name", "weight", "inputs", "state"), [
    ("b200", "mxfp4", "mxfp8_e4m3", "native"), ("b200", "nvfp4", "nvfp4", "native"),
    ("b200", "nvfp4", "mxfp4", "simulated"), ("b200", "int4_g32", "int4_g32_zp", "simulated"),
    ("h100", "mxfp4", "mxfp4", "simulated"), ("h100", "e4m3", "mxfp8_e4m3", "simulated"),
    ("x86-amx", "int4_g32", "int8", "simulated"), ("x86-amx", "int4", "int4_zp", "carried"),
    ("x86-amx", "int8", "int8_zp", "simulated"), ("h100", "int4", "int4_zp", "simulated"),
])  # fmt: skip
def test_blocks_run_only_where_blocks_are_known(name: str, weight: str, inputs: str, state: str) -> None:
    assert load_profile(name).runs(LayerFormats.of(weight, inputs)).state == state


def test_shares_by_hand() -> None:
    layers = [
        LayerInfo(name, "linear", macs, 10, 1, n)
        for n, (name, macs) in enumerate(zip("abc", (10, 20, 30), strict=True))
    ]
    allocation = Allocation(
        {
            "a": LayerFormats.of("int8", "int8"),
            "b": LayerFormats.of("int4", "int4"),
            "c": LayerFormats.of("int12", "int12"),
        }
    )
    total = 10 * 64 + 20 * 16 + 30 * 144
    assert native_share(load_profile("h100"), layers, allocation) == pytest.approx(
        {"native": 640 / total, "carried": 320 / total, "simulated": 0, "nowhere known": 4320 / total}, rel=1e-12
    )
    fp32 = native_share(load_profile("h100"), layers, Allocation({}))
    assert fp32["simulated"] == pytest.approx(1, rel=1e-12)


def test_a_search_space_is_restricted() -> None:
    formats = [parse(name) for name in ("int4", "int12", "e2m1", "e4m3")]
    kept = [fmt.name for fmt in restricted(formats, load_profile("onnxruntime-cpu"))]
    assert kept == ["int4", "e2m1"]
    with pytest.raises(ConfigError, match="runs none of int12"):
        restricted([parse("int12")], load_profile("h100"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (VALID + "speed: 3\n", r"mine\.yaml, line 6: unknown key 'speed'; known are title"),
        (VALID.replace("mine", "3"), "line 1: title has the value 3"),
        (VALID.replace("fallback: slow\n", ""), "fallback is missing; add it"),
        (VALID.replace("int4", "int99"), "line 4: .*int99"),
        (VALID + "largest_weight_code: 100\n", "line 6: largest_weight_code is 64 or 127"),
        (VALID + "bandwidth_gb_s: 100\n", "line 6: .*a figure needs its source"),
        (VALID + "bf16_tflops: 100\n", "line 6: bf16_tflops and bf16_source .*a figure needs its source"),
        (VALID.replace("inputs", "input"), "line 4: pairs: .*needs weights and inputs"),
        (VALID + "title: yours\n", "line 6: title is there more than once"),
        *(
            (VALID + f"{name}: {value}\n{name.split('_')[0]}_source: x\n", f"line 6: {name}=.* must be a positive")
            for name in ("bandwidth_gb_s", "bf16_tflops")
            for value in (".nan", ".inf", "-3", "0", "1" + "0" * 400)
        ),
        *(
            (VALID.replace("[int8]}", f"[int8], rate: {rate}}}"), "line 4: pairs: rate .* must be a positive")
            for rate in (".nan", ".inf", "0", "fast", "true")
        ),
        ("a: " + "[" * 5000 + "]" * 5000, "is no YAML: maximum recursion depth"),
        ("- a\n", "line 1: a profile is 'key: value' lines"),
        ("a: [", "is no YAML"),
    ],
)
def test_profiles_of_ones_own_are_checked(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile(str(file))
    file.write_text(VALID)
    assert load_profile(str(file)).runs(LayerFormats.of("int4", "int8")).state == "native"
    with pytest.raises(ConfigError, match="'tpu' does not exist; choose from auto, a100"):
        load_profile("tpu")


@pytest.mark.parametrize("name", ["vit", "clip"])
def test_the_share_of_a_checkpoint_counts_its_fp32_layers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As its card does: a model that is quantized in one layer is not native as a whole."""
    model = tiny(name)
    packed = quantize(model, Allocation({"classifier": LayerFormats.of("int8", "int8")}))
    packed.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    macs = {layer.name: layer.macs for layer in trace_layers(tiny(name))}
    quantized, rest = 64 * macs["classifier"], 1024 * (sum(macs.values()) - macs["classifier"])
    share = {"native": quantized / (quantized + rest), "carried": 0, "nowhere known": 0}
    share["simulated"] = 1 - share["native"]
    capsys.readouterr()
    for command in ("hardware", "check"), ("inspect",):
        assert fliqs_hf_cli.main([*command, str(tmp_path), "--hardware", "x86-amx", "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data.get("share", data["hardware"]["share"] if command == ("inspect",) else None) == pytest.approx(
            share
        )


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run")
    capsys.readouterr()  # progress bars
    for command, wanted in {
        ("list",): "arm-dotprod",
        ("show", "a100"): "2039",
        ("check", str(tmp_path / "run"), "--hardware", "h100"): "nowhere known",
    }.items():
        assert fliqs_hf_cli.main(["hardware", *command]) == 0
        assert wanted in capsys.readouterr().out
    assert fliqs_hf_cli.main(["hardware", "check", str(tmp_path / "run"), "--hardware", "h100", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert sum(data["share"].values()) == pytest.approx(1) and data["layers"][0]["runs"] == "carried"
    share = data["share"]
    assert fliqs_hf_cli.main(["inspect", str(tmp_path / "run"), "--hardware", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hardware"] == {"profile": "h100", "share": pytest.approx(share)}
    assert fliqs_hf_cli.main(["inspect", str(tmp_path / "run"), "--hardware", "h100"]) == 0
    assert "bit operations on h100: " in capsys.readouterr().out
    assert fliqs_hf_cli.main(["hardware", "show"]) == 2
