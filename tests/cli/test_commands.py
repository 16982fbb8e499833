"""The commands as a user types them: answers, files, exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, Features, Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import fliqs_hf
from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.cost import bops, trace_layers, weight_bytes
from fliqs_hf.hf.card import model_card
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.ptq import calibrate, rotate
from fliqs_hf.runs.folder import RunFolder
from fliqs_hf.training.images import pixels
from fliqs_hf.training.splits import load_split
from fliqs_hf_cli import main
from tests.helpers.hub_server import HubServer
from tests.helpers.models import images, tiny
from tests.helpers.runs import write_run
from tests.recipes.test_vit import write as write_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, fp32: Path) -> Path:
    """Random images, labelled with the fp32 model's answers to one half of them and others to the rest."""
    from PIL import Image as PILImage

    folder = tmp_path_factory.mktemp("photos")
    model = AutoModelForImageClassification.from_pretrained(fp32)
    names = list(model.config.id2label.values())
    generator = torch.Generator().manual_seed(1)
    pictures = [
        PILImage.fromarray(torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(24)
    ]
    labels = [i % len(names) for i in range(24)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    data = Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    (folder / "data").mkdir()
    data.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    """The JSON that a command prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    assert main(list(arguments)) == status
    return capsys.readouterr().err


def test_formats_lists_what_a_format_can_say(capsys: pytest.CaptureFixture[str]) -> None:
    (e2m1,) = answer(capsys, "formats", "FP4")
    assert e2m1 == {
        "name": "e2m1", "bits": 4, "bits_with_scales": 4, "kind": "floating point", "largest": 6.0, "smallest": 0.5,
        "values": 15, "scaled": True, "aliases": ["fp4"],
    }  # fmt: skip
    assert [row["bits_with_scales"] for row in answer(capsys, "formats", "mxfp4", "int4_g32")] == [4.25, 4.5]
    assert main(["formats"]) == 0
    assert "e4m3" in capsys.readouterr().out
    assert "unknown format 'int99x'" in failure(capsys, "formats", "int99x")


def test_estimate_reads_nothing_but_the_config(fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes((fp32 / "config.json").read_bytes())
    found = answer(capsys, "estimate", str(tmp_path), "--formats", "int4", "--layers")
    layers = trace_layers(tiny("vit", 0))
    names = [layer.name for layer in layers]
    rows = {row["formats"]: row for row in found["models"]}
    assert rows["int4"]["bops"] == bops(layers, Allocation.uniform(names, "int4"))
    assert rows["fp32"]["bops"] == sum(layer.macs for layer in layers) * 1024
    difference = weight_bytes(layers, {}) - weight_bytes(layers, Allocation.uniform(names, "int4"))
    assert rows["fp32"]["bytes"] - rows["int4"]["bytes"] == difference
    assert [layer["name"] for layer in found["layers"]] == names
    larger = answer(capsys, "estimate", str(tmp_path), "--formats", "int4", "--image_size", "64")
    assert larger["macs"] > 3 * found["macs"]


def test_estimate_of_an_allocation_and_of_a_checkpoint(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("vit", 0)
    layers = trace_layers(model)
    allocation = Allocation.uniform([layer.name for layer in layers[:3]], "int5", None)
    allocation.save(tmp_path / "a.json")
    fliqs_hf.quantize(model, allocation).save_pretrained(tmp_path / "packed")
    for arguments in ([str(fp32), "--allocation", str(tmp_path / "a.json")], [str(tmp_path / "packed")]):
        rows = answer(capsys, "estimate", *arguments)["models"]
        assert rows[-1]["bops"] == bops(layers, allocation)
    assert "there is no folder" in failure(capsys, "estimate", str(tmp_path / "nowhere"))


def test_quantize_uniform_inspect_and_card(fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    result = answer(capsys, "quantize", str(fp32), str(out), "--weight_format", "int4", "--activation_format", "none")
    packed = AutoModelForImageClassification.from_pretrained(out)
    expected = AutoModelForImageClassification.from_pretrained(
        fp32, quantization_config=fliqs_hf.FLIQSConfig(weight_format="int4", activation_format=None)
    )
    x = images(2)
    with torch.no_grad():
        assert torch.equal(packed(x).logits, expected(x).logits)
    found = answer(capsys, "inspect", str(out), "--layers")
    assert found["formats"] == [{"weight": "int4", "activation": "fp32", "layers": len(found["layers"])}]
    why = "the input is not quantized"
    assert found["kernels"] == [{"kernel": "decoded", "why": why, "layers": len(found["layers"])}]
    assert {(layer["kernel"], layer["why"]) for layer in found["layers"]} == {("decoded", why)}
    assert found["file_bytes"] == result["checkpoint_bytes"]
    assert "was not measured" in str(model_card(out))
    assert "holds a run already" in failure(capsys, "quantize", str(fp32), str(out))
    assert main(["quantize", str(fp32), str(out), "--overwrite"]) == 0
    assert answer(capsys, "inspect", str(out))["formats"][0]["weight"] == "int8"


def test_quantize_to_a_target_reports_why(
    fp32: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["quantize", str(fp32), str(out), "--target_bits", "4", "--calibration", str(photos)]
    result = answer(capsys, *arguments)
    layers = trace_layers(tiny("vit", 0))
    target = bops(layers, Allocation.uniform([layer.name for layer in layers], "int4"))
    assert 0.97 * target <= result["cost"]["bops"] <= target
    assert json.loads((out / "fliqs/sensitivity.json").read_text())["images"] == 24
    assert len({formats["weight"] for formats in result["allocation"].values()}) > 1
    assert answer(capsys, "report", str(out))["report"] == str(out / "fliqs/report.html")
    assert "one step down" in (out / "fliqs/report.html").read_text()

    # The model's own answers serve where no labels are wanted.
    assert main([*arguments[:-1], str(photos), "--label_column", "none", "--overwrite"]) == 0
    again = json.loads((out / "fliqs/sensitivity.json").read_text())["scores"]
    assert again != {}


def test_quantize_calibrates(fp32: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = quantizable_layers(tiny("vit", 0))
    one_sided = Allocation({name: LayerFormats.of("int3", "int3_zp") for name in layers})
    plain = ["--rotation", "false", "--zero_points", "false"]
    split = load_split(str(photos), "train")[0].shuffle(seed=0)
    processor = AutoImageProcessor.from_pretrained(fp32)
    batch = torch.stack([pixels(row["image"], processor, "") for row in split])
    x = images(2)
    for number, (given, expected) in enumerate(
        (
            ([], {}),
            (["--rotation", "false"], {}),
            (
                [*plain, "--rounding", "nearest", "--bias_correction", "true"],
                {"rounding": "nearest", "bias_correction": True},
            ),
            (
                ["--rotation", "false", "--activations", "mse", "--weight_scale", "absmax"],
                {"activations": "mse", "weight_scale": "absmax"},
            ),
        )
    ):
        out = tmp_path / str(number)
        formats = ["--weight_format", "int3", "--activation_format", "int3"]
        answer(capsys, "quantize", str(fp32), str(out), *formats, "--calibration", str(photos), *given)
        found = AutoModelForImageClassification.from_pretrained(out)
        model = tiny("vit", 0)
        if "--rotation" not in given:
            rotate(model, batch[:4])
        allocation = Allocation.uniform(layers, "int3") if expected else one_sided
        wanted = calibrate(model, allocation, [batch], **expected)
        with torch.no_grad():
            assert torch.equal(found(x).logits, wanted(x).logits), given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target_bits", "4"], "--calibration"),
        (["--calibration", "x"], "cannot load the data set 'x'"),
        (["--rounding", "gptq"], "--rounding gptq needs images"),
        (["--bias_correction", "true"], "--bias_correction true needs images"),
        (["--activations", "mse"], "--activations mse needs images"),
        (["--rotation", "true"], "--rotation true needs images"),
        (["--zero_points", "true"], "--zero_points true needs images"),
        (["--weight_scale", "output"], "found by GPTQ"),
        (["--weight_format", "int4", "--target_bits", "4", "--calibration", "x"], "give one of"),
        (["--target_bits", "1", "--calibration", "digits"], "below the cheapest"),
        (["--weight_format", "int1"], "int1"),
        (["--calibration_images", "0"], "at least 1"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_quantize_refuses_bad_arguments(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in failure(capsys, "quantize", str(fp32), str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run").exists()


def test_validate_is_a_gate(fp32: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["quantize", str(fp32), str(out)]) == 0
    capsys.readouterr()
    arguments = ["validate", str(fp32), str(out), "--dataset_name", str(photos), "--max_drop"]
    passed = answer(capsys, *arguments, "99", "--output", str(tmp_path / "page.html"))
    assert passed["images"] == 24
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert json.loads((out / "fliqs/validation.json").read_text())["images"] == 24
    assert "on the same 24 images" in str(model_card(out))
    answer(capsys, *arguments, "0.1", status=1)
    assert "the ending says the form" in failure(capsys, *arguments, "1", "--output", "page.pdf")
    assert "no split 'nowhere'" in failure(capsys, *arguments, "1", "--split", "nowhere")


def test_inspect_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert "intact" in capsys.readouterr().out
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert answer(capsys, "inspect", str(tmp_path), status=1)["error"].startswith("CheckpointError")


@pytest.mark.slow
def test_push_and_inspect_by_name(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")

        def command(*arguments: str) -> Any:
            run = [sys.executable, "-m", "fliqs_hf_cli", *arguments, "--json"]
            done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
            return done.returncode, json.loads(done.stdout)

        status, pushed = command("push", str(tmp_path / "run"), "user/pilot", "--private")
        assert status == 0, pushed
        assert "model.safetensors" in hub.repos["user/pilot"].files()
        status, found = command("inspect", "user/pilot")
        assert status == 0
        assert found["quantized"]["layers"] > 5
        status, failed = command("inspect", "user/nothing")
        assert status == 2
        assert "HubError" in failed["error"]


def test_search_is_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["search", "--help"])
    assert done.value.code == 0
    assert "--target_bits" in capsys.readouterr().out
    failed = answer(capsys, "search", "--target_bit", "4", status=2)
    assert "unknown argument '--target_bit'" in failed["error"]
    assert main(["search", "--target_bit", "4"]) == 2
    assert "did you mean 'target_bits'" in capsys.readouterr().err


def test_json_is_alone_on_stdout(
    fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a library prints, such as DeepSpeed when it is imported."""
    original = RunFolder.configure
    monkeypatch.setattr(RunFolder, "configure", lambda *values: print("[WARNING] noise") or original(*values))
    found = answer(capsys, "quantize", str(fp32), str(tmp_path / "packed"))
    assert found["output"] == str(tmp_path / "packed")
    main(["quantize", str(fp32), str(tmp_path / "again")])
    assert "[WARNING] noise" in capsys.readouterr().out


def test_search_and_compare_answer_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = write_settings(tmp_path, finetune_steps=2, max_steps=2)
    (result,) = answer(capsys, "search", str(settings))
    assert result["run"] == str(tmp_path / "run")
    assert result["accuracy"]["searched"]["n"] == 64
    arguments = [
        "--dataset_name",
        "digits",
        "--use_cpu",
        "--methods",
        "uniform-int",
        "--target_bits",
        "4",
        "--seeds",
        "0",
    ]
    arguments += ["--max_steps", "1", "--max_eval_samples", "16", "--output", str(tmp_path / "out.csv")]
    (row,) = answer(capsys, "compare", str(tmp_path / "run" / "fliqs/fp32"), *arguments)
    assert (row["method"], row["bits"], row["cost"], row["seeds"]) == ("uniform-int", 4.0, 1.0, 1)
