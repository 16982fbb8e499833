"""`fliqs-hf export` and `fliqs_hf.export`: files, comparison, refusals; exported files as models of other commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import ViTImageProcessor

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.errors import CheckpointError, ConfigError, DependencyError, ExportError
from fliqs_hf.hf.export.agreement import Agreement, compare
from fliqs_hf.hf.export.forms import OnnxSettings
from fliqs_hf.nn.kernels import set_kernels
from fliqs_hf.nn.packed import PackedLayer
from fliqs_hf.pipeline.checkpoints import load_model
from fliqs_hf_cli import main
from tests.helpers.models import images, tiny

onnx_ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4", activation_format="int8"))
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "onnx"
    fliqs_hf.export(checkpoint, folder, images=[images(4), images(3, seed=2)])
    return folder


def test_the_folder_is_complete_and_its_record_true(checkpoint: Path, exported: Path) -> None:
    record = json.loads((exported / "export.json").read_text())
    assert set(record["files"]) == {path.name for path in exported.iterdir()}
    assert record["files"][0] == "model.onnx"
    assert {record["agreement"][name] for name in ("images", "same", "itself")} == {7}
    assert record["min_agreement"] == Agreement(7, 7, 0, 0, itself=7).least
    assert {(layer["form"], layer["stored"]) for layer in record["layers"]} == {("integer", "INT4")}
    assert record["file_bytes"] == (exported / "model.onnx").stat().st_size
    layers = fliqs_hf.nn.packed_layers(load_model(str(checkpoint))).values()
    assert record["packed_bytes"] == sum(x.weight_codes.numel() + 4 * x.weight_scale.numel() for x in layers)
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())


def test_the_file_carries_the_allocation(exported: Path) -> None:
    model = onnx_ir.load(exported / "model.onnx")
    data = json.loads(model.metadata_props["fliqs_hf"])
    assert len(data["layers"]) == 14
    assert data["layers"]["vit.layers.1.mlp.fc1"] == {
        "weight": "int4", "activation": "int8", "form": "integer", "stored": "INT4",
    }  # fmt: skip


def test_onnxruntime_alone_runs_it(checkpoint: Path, exported: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"pixel_values": images(2).numpy()})
    with torch.no_grad():
        expected = load_model(str(checkpoint))(images(2)).logits
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)  # no code rounds otherwise on these images


def test_agreement_counts_and_measures() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: list[list[float]]) -> None:
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, pixels: Any) -> Any:
            return self.logits

    found = compare(Fixed([[1.0, 0.0], [3.0, 0.0]]), Fixed([[0.0, 1.0], [3.0, 0.0]]), [torch.zeros(2)])
    assert (found.images, found.same, found.percent) == (2, 1, 50.0)
    assert (found.rms, found.logits_rms) == pytest.approx((0.5**0.5, 2.5**0.5))
    with pytest.raises(ExportError, match="NaN"):
        compare(Fixed([[1.0, 0.0]]), Fixed([[float("nan"), 0.0]]), [torch.zeros(1)])


def test_what_is_asked_for_follows_from_the_packed_model() -> None:
    """Three standard errors of the difference of two shares below its agreement with itself, moved a little."""

    class Fine(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            return pixels.flatten(1)[:, :3]

    class Chaotic(Fine):
        def forward(self, pixels: Any) -> Any:
            return (super().forward(pixels) * 1e8).sin()

    pixels = images(200)
    fine, chaotic = (compare(model, model, pixels.split(50), itself=True) for model in (Fine(), Chaotic()))
    assert (fine.same, fine.itself, chaotic.same) == (200, 200, 200)
    assert 30 < chaotic.itself < 110  # a third of the three answers
    error = (2 * (201 / 202) * (1 / 202) / 200) ** 0.5
    assert fine.least == pytest.approx(100 * (1 - 3 * error)) == pytest.approx(97.9, abs=0.05)
    assert Agreement(100, 50, 0, 0, itself=50).least == pytest.approx(100 * (0.5 - 3 * 0.005**0.5))
    assert Agreement(4, 0, 0, 0, itself=0).least == 0
    assert compare(Fine(), Fine(), [pixels]).least is None


def test_too_little_agreement_leaves_no_file(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: PackedLayer) -> Any:
        return np.ones(layer.weight_shape[0], dtype=np.float32)

    monkeypatch.setattr("fliqs_hf.hf.export.rewritten.channels", wrong)
    (tmp_path / "out").mkdir()
    assert main(["export", str(checkpoint), str(tmp_path / "out"), "--min_agreement", "100"]) == 1
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(ExportError, match=r"less than min_agreement=\d.* the packed model gives 100.00 % of them"):
        fliqs_hf.export(checkpoint, tmp_path / "out", images=[images(64)])
    assert not list((tmp_path / "out").iterdir())


def test_settings_of_the_file(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(checkpoint), str(tmp_path / "out"), "--include_preprocessing", "--external_data",
               "--input_scales", "per_tensor", "--form", "integer", "--json"]  # fmt: skip
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["files"][:2] == ["model.onnx", "model.onnx.data"]
    assert data["images"] == "generated" and data["min_agreement"] is None
    assert all("as asked for" in layer["changed"] for layer in data["layers"])
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).float()
    values = (pixels / 255 - 0.5) / 0.5
    with torch.no_grad():
        expected = load_model(str(checkpoint))(values).logits
    found = load_model(str(tmp_path / "out"))(pixels).logits
    assert (found - expected).abs().max() < 0.05  # logits are 0.2; inputs are quantized otherwise, to 8 bits

    assert main(command) == 2  # there is one
    assert "overwrite" in capsys.readouterr().err
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert main([*command, "--overwrite"]) == 2
    assert "mine.txt is in the way" in capsys.readouterr().err
    (tmp_path / "out" / "mine.txt").unlink()
    assert main([*command, "--overwrite"]) == 0


def test_what_protobuf_cannot_hold_goes_beside_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every larger tensor, without being asked, here above 8 kB instead of 1.8 GB; by names that the folder may be
    moved with. An export that replaces it leaves nothing of it."""
    monkeypatch.setattr("fliqs_hf.hf.export.onnx_file._MOST_BYTES", 8_000)
    result = fliqs_hf.export(checkpoint, tmp_path / "out", images=[images(4)])
    assert result.files[:2] == ("model.onnx", "model.onnx.data") and result.agreement.same == 4
    sizes = [(tmp_path / "out" / name).stat().st_size for name in result.files[:2]]
    assert result.file_bytes == sum(sizes)
    model = onnx_ir.load(tmp_path / "out" / "model.onnx")
    inside = [v.const_value for v in model.graph.initializers.values() if not hasattr(v.const_value, "location")]
    assert max(tensor.nbytes for tensor in inside) <= 256
    (tmp_path / "out").rename(tmp_path / "moved")
    with torch.no_grad():
        expected = load_model(str(checkpoint))(images(2)).logits
    torch.testing.assert_close(load_model(str(tmp_path / "moved"))(images(2)).logits, expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "moved" / "model.onnx.data").unlink()
    with pytest.raises(CheckpointError, match=r"cannot load .*model\.onnx"):
        load_model(str(tmp_path / "moved"))
    monkeypatch.undo()
    (tmp_path / "moved" / "model.onnx.data").touch()
    fliqs_hf.export(checkpoint, tmp_path / "moved", overwrite=True)
    assert not (tmp_path / "moved" / "model.onnx.data").exists()


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with the classes of the digits."""
    folder, model = tmp_path_factory.mktemp("ten"), tiny("vit")
    model.classifier = torch.nn.Linear(32, 10)
    model.config.num_labels = 10
    fliqs_hf.quantize(model, FLIQSConfig()).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("to", "files"), [("onnx", ["model.onnx"]), ("openvino", ["model.xml", "model.bin"])])
def test_validate_takes_an_exported_file(
    ten_classes: Path, tmp_path: Path, to: Any, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """By its folder and by its name, to a verdict and its page; a damaged file is named."""
    pytest.importorskip(to)
    fliqs_hf.export(ten_classes, tmp_path / "out", to=to)
    command = ["--max_samples", "40", "--dataset_name", "digits", "--match_labels", "index", "--json"]
    for name in (tmp_path / "out", tmp_path / "out" / files[0]):
        capsys.readouterr()
        page = ["--output", str(tmp_path / "page.html"), "--max_drop", "100"]
        assert main(["validate", str(ten_classes), str(name), *command, *page]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["agreement"]["count"] >= 38  # of random logits, which are close to each other, in bf16 as well
        assert (data["images"], data["exit_code"]) == (40, 0) and data["gate"] is not None
        assert data["quantized"]["checkpoint_bytes"] == sum((tmp_path / "out" / f).stat().st_size for f in files)
        assert "Validation: original against quantized" in (tmp_path / "page.html").read_text()
    (tmp_path / "out" / files[0]).write_text("no model")
    assert main(["validate", str(ten_classes), str(tmp_path / "out"), *command]) == 1
    error = capsys.readouterr().err
    assert f"cannot load {tmp_path / 'out' / files[0]}" in error and "Traceback" not in error


@pytest.mark.parametrize(("settings", "words"), [
    ({"to": "tflite"}, "to='tflite' does not exist"), ({"min_agreement": 101}, "percent between 0 and 100"),
    ({"to": "torch", "settings": OnnxSettings()}, "to='torch' has no OnnxSettings"),
    ({"to": "openvino", "settings": OnnxSettings()}, "to='openvino' has no OnnxSettings"),
    ({"to": "torch", "include_preprocessing": True}, "to='torch' has no include_preprocessing"),
])  # fmt: skip
def test_bad_settings_are_named_before_any_work(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        fliqs_hf.export(checkpoint, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", [{"form": "fast"}, {"opset": 13}, {"input_scales": "none"}, {"weight_codes": "u"}])
def test_bad_settings_of_onnx_files_are_named(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        OnnxSettings(**setting)


def test_a_torch_program_gives_the_same_bits(checkpoint: Path, tmp_path: Path) -> None:
    """Traced with gradients on, reloaded, in other batch sizes: it is the reference path, operation by operation."""
    result = fliqs_hf.export(checkpoint, tmp_path / "out", to="torch", min_agreement=100)
    assert result.files[0] == "model.pt2" and result.agreement.rms == 0
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    model = load_model(str(checkpoint))
    set_kernels(model, "reference")
    for count in (1, 5):
        with torch.no_grad():
            assert torch.equal(program(images(count)), model(images(count)).logits)
    stored = {name for name, tensor in program.state_dict().items() if tensor.dtype == torch.uint8}
    assert len(stored) == 14  # packed, not decoded


def test_bad_models_and_places_are_named(checkpoint: Path, tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path / "plain")
    for run, output, words in (
        (tmp_path / "plain", tmp_path / "out", "not quantized by fliqs_hf"),
        (tmp_path / "nothing", tmp_path / "out", "no folder"),
        (checkpoint, checkpoint / "inside", "only read"),
        (checkpoint, tmp_path / "plain", "is in the way"),
        (checkpoint, "", "no usable name"),
    ):
        with pytest.raises(ConfigError, match=words):
            fliqs_hf.export(run, output)


def test_openvino_files_are_compared_and_validated(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the precision that OpenVINO takes by itself, bf16 on CPUs with units for it: logits within its 2**-8."""
    pytest.importorskip("openvino")
    out = tmp_path / "out"
    command = ["export", str(checkpoint), str(out), "--to", "openvino", "--inputs", "as_packed", "--json"]
    assert main([*command, "--include_preprocessing"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["files"][:2] == ["model.xml", "model.bin"]
    assert set(data["files"]) == {path.name for path in out.iterdir()}
    assert {(layer["form"], layer["stored"]) for layer in data["layers"]} == {("float", "INT4")}
    assert data["file_bytes"] == sum((out / name).stat().st_size for name in data["files"][:2])
    assert data["agreement"]["rms"] < 2**-8 * data["agreement"]["logits_rms"] * 4  # of four roundings in a row
    pixels = torch.randint(0, 256, (2, 3, 32, 32)).float()
    with torch.no_grad():
        expected = load_model(str(checkpoint))((pixels / 255 - 0.5) / 0.5).logits
    for name in (out, out / "model.xml"):
        torch.testing.assert_close(load_model(str(name))(pixels).logits, expected, rtol=0, atol=0.02)
    assert main([*command, "--overwrite", "--form", "qdq"]) == 2
    assert "--form is no setting of --to openvino" in capsys.readouterr().err


def test_a_missing_extra_is_named_first(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"onnxruntime: pip install 'fliqs-hf\[onnx\]'"):
        fliqs_hf.export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
