"""Images and labels as the commands read them: classes by number, parts of splits, rows in errors, what was seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from fliqs_hf.cli import held_out
from fliqs_hf.cli.calibration import CalibrationImages
from fliqs_hf.cli.data import to_validate
from fliqs_hf.pipeline.job import load
from fliqs_hf.training.arguments import parse
from fliqs_hf_cli import main
from tests.cli.test_commands import answer, failure

NUMBERS = [str(number) for number in range(12)]


def save(folder: Path, **config: Any) -> str:
    """A model of 12 classes that answers LABEL_2 to every image."""
    torch.manual_seed(0)
    settings = {"num_labels": 12, "num_channels": 3, **config}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=8, **settings))
    if settings["num_labels"] > 2:
        model.classifier.bias.data[2] = 9
    model.save_pretrained(folder)
    mean = [0.5] * settings["num_channels"]
    hf.ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=mean, image_std=mean).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, fp32: str) -> str:
    out = tmp_path_factory.mktemp("runs") / "packed"
    assert main(["quantize", fp32, str(out)]) == 0
    return str(out)


def photos(folder: Path, counts: dict[str, int]) -> str:
    """An image folder with so many images of each class."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return str(folder)


def calibration(model: str, data: str, *more: str) -> CalibrationImages:
    import argparse

    import fliqs_hf_cli

    parser = fliqs_hf_cli.Parser(prog="fliqs-hf")
    fliqs_hf_cli.add_commands(parser)
    args = parser.parse_args(["quantize", model, "out", "--calibration", data, *more])
    assert isinstance(args, argparse.Namespace)
    loaded = hf.AutoModelForImageClassification.from_pretrained(model)
    return CalibrationImages(args, loaded, hf.AutoImageProcessor.from_pretrained(model))


@pytest.mark.parametrize("form", ["{}", "class_{:0>3}", "LABEL_{}"])
def test_classes_by_number_in_every_command(
    fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    """Folders are sorted as text; the model says 2, and 9 of 20 images are in the folder of that number."""
    counts = {form.format(name): 9 if name == "2" else 1 for name in NUMBERS}
    data = photos(tmp_path / "photos", counts)
    found = answer(capsys, "validate", fp32, packed, "--dataset_name", data)
    assert found["original"]["top1"]["value"] == 9 / 20
    assert found["conditions"]["labels"] == ("name" if form == "LABEL_{}" else "number")
    labels = torch.cat([labels for _, labels in calibration(fp32, data).labelled()])
    assert sorted(labels.tolist()) == sorted([*range(12), *[2] * 8])
    settings = ["--model_name_or_path", fp32, "--train_dir", data, "--use_cpu", "--output_dir", str(tmp_path / "run")]
    job = load(*parse(settings))
    assert job.train_data.labels.count(2) + job.eval_data.labels.count(2) == 9  # type: ignore[union-attr]


def test_without_labels_the_answers_are_those_of_the_fp32_model_at_every_pass(fp32: str, tmp_path: Path) -> None:
    """The second pass of `--score two-pass` is in a quantized model, whose own answers may be others."""
    data = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 2))
    found = calibration(fp32, data, "--label_column", "none", "--batch_size", "5")
    first = [labels for _, labels in found.labelled()]
    with torch.no_grad():
        for parameter in found._model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    fresh = torch.cat([found.task.answers(found._model(images).logits) for images, _ in found.labelled()])
    again = [labels for _, labels in found.labelled()]
    assert [len(labels) for labels in first] == [5, 5, 5, 5, 4]
    assert torch.equal(torch.cat(again), torch.cat(first)) and not torch.equal(fresh, torch.cat(first))


def test_a_column_that_does_not_exist_is_refused_and_not_the_models_answers(
    fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In every command that is told columns; what there is instead is said."""
    data, other = (photos(tmp_path / name, dict.fromkeys(NUMBERS, 4)) for name in ("photos", "others"))
    run = str(tmp_path / "run")
    quantize = ["quantize", fp32, run, "--calibration", data, "--calibration_images", "8"]
    for arguments in (
        [*quantize, "--target_bits", "4"],
        [*quantize, "--max_drop", "99", "--held_out", other],
        ["front", fp32, run, "--calibration", data],
        ["recommend", fp32, run, "--calibration", data],
        ["validate", fp32, packed, "--dataset_name", data],
    ):
        said = failure(capsys, *arguments, "--label_column", "labels")
        assert "column 'labels' does not exist" in said and "image, label" in said, arguments
        assert "column 'pixels' does not exist" in failure(capsys, *arguments, "--image_column", "pixels")
        assert not (tmp_path / "run").exists()
    export = ["export", packed, run, "--dataset_name", data]
    for arguments in (quantize, export):  # which need no labels
        assert "column 'pixels' does not exist" in failure(capsys, *arguments, "--image_column", "pixels")


def test_held_out_images_may_have_a_column_that_those_of_the_calibration_lack(
    fp32: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat, classes = photos(tmp_path / "flat", {"": 8}), photos(tmp_path / "held", {"2": 30, "3": 9})
    (tmp_path / "table").mkdir()
    datasets.load_dataset(classes)["train"].rename_column("label", "fine").to_parquet(
        tmp_path / "table" / "test.parquet"
    )
    formats = ["--target_bits", "6", "--search_space", "int4", "int8", "--label_column", "fine"]
    floor = ["--min_accuracy", "0.1", "--held_out", str(tmp_path / "table")]
    run = ["quantize", fp32, str(tmp_path / "run"), "--calibration", flat, *formats, *floor]
    assert main(run) == 0
    assert "the calibration data have no column 'fine': the model's own answers serve" in capsys.readouterr().err


def test_a_model_whose_answers_are_not_finite_meets_no_floor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fp32 model would have some images right, and the packed one would be no worse."""
    source = tmp_path / "fp32"
    save(source)
    model = hf.ViTForImageClassification.from_pretrained(source)
    model.classifier.weight.data.fill_(3e38)
    model.classifier.bias.data.fill_(3e38)
    model.save_pretrained(source)
    data = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 4))
    run = ["quantize", str(source), str(tmp_path / "run"), "--weight_format", "int8", "--calibration", data]
    capsys.readouterr()
    assert main([*run, "--calibration_images", "8", "--max_drop", "50"]) == 1
    assert "held-out images, fp32: the model returns NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()


def test_only_so_many_bytes_of_held_out_images_are_kept(
    fp32: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, size = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 4)), 3 * 8 * 8 * 4
    monkeypatch.setattr(held_out, "KEPT_BYTES", 5 * size + size - 1)
    found = calibration(fp32, data, "--calibration_images", "8")
    images = held_out.HeldOutImages(found._args, found._model, found._processor, found)
    first = images.right(found._model, "first")
    assert len(images) == 40 and len(images._kept) == 5
    assert images.right(found._model, "again").tolist() == first.tolist()


@pytest.mark.parametrize("command", ["validate", "quantize"])
def test_other_numbers_are_refused_or_taken_as_they_are(
    fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    data = photos(tmp_path / "photos", {str(number): 1 for number in range(1, 13)})
    arguments = ["validate", fp32, packed, "--dataset_name", data]
    if command == "quantize":
        formats = ["--target_bits", "4", "--search_space", "int2", "int4", "int8"]
        arguments = ["quantize", fp32, str(tmp_path / "run"), *formats, "--calibration", data]
    assert "--match_labels index" in failure(capsys, *arguments)
    assert main([*arguments, "--match_labels", "index"]) == 0


def test_regression_is_refused_where_formats_or_accuracies_follow_from_it(
    packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photos(tmp_path / "photos", {"0": 4, "1": 4})
    for number, config in enumerate(({"num_labels": 1}, {"num_labels": 2, "problem_type": "regression"})):
        model = save(tmp_path / str(number), **config)
        target = ["quantize", model, str(tmp_path / "run"), "--target_bits", "4", "--calibration", data]
        for arguments in (
            target,
            [*target, "--label_column", "none"],
            ["validate", model, model, "--dataset_name", data],
        ):
            assert "ConfigError: the model has" in failure(capsys, *arguments)
        assert main(["quantize", model, str(tmp_path / f"run{number}"), "--calibration", data]) == 0  # needs no loss


def test_an_unreadable_image_in_every_command(
    fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 2))
    bad = tmp_path / "photos" / "3" / "1.png"  # folders are sorted as text: 0, 1, 10, 11, 2, 3
    bad.write_bytes(bad.read_bytes()[:50])
    named = f"image 11 of train ({bad}) cannot be read"
    target = ["quantize", fp32, str(tmp_path / "run"), "--calibration", data]
    validation = ["validate", fp32, packed, "--dataset_name", data]
    for arguments in (
        target,
        [*target, "--target_bits", "4"],
        [*target, "--calibration_split", "train[9:12]+train[20:]"],
        validation,
        [*validation, "--max_samples", "24"],
        [*validation, "--split", "train[9:12]", "--max_samples", "3"],
    ):
        assert named in failure(capsys, *arguments)


def test_a_folder_without_classes(fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photos serve for calibration; a validation says how the folder must look."""
    data = photos(tmp_path / "photos", {"": 4})
    formats = ["--target_bits", "4", "--search_space", "int2", "int4", "int8"]
    answer(capsys, "quantize", fp32, str(tmp_path / "run"), "--calibration", data, *formats)
    assert "one sub-folder per class" in failure(capsys, "validate", fp32, packed, "--dataset_name", data)


def test_a_data_set_without_a_name(fp32: str, packed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["quantize", fp32, str(tmp_path / "run"), "--calibration", ""],
        ["validate", fp32, packed, "--dataset_name", ""],
        ["search", "--dataset_name", "", "--model_name_or_path", fp32, "--output_dir", str(tmp_path / "run")],
    ):
        assert re.search("the data set '' is no name|'' is empty", failure(capsys, *arguments))


def test_grey_models_and_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16-bit grey is calibrated on and validated with alike, for models of one channel too."""
    data = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 1))
    for file in Path(data).rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(file).convert("L")).astype(np.uint16) * 257).save(file)
    for channels in (1, 3):
        model, out = save(tmp_path / f"model{channels}", num_channels=channels), tmp_path / f"run{channels}"
        formats = ["--target_bits", "4", "--search_space", "int2", "int4", "int8"]
        answer(capsys, "quantize", model, str(out), "--calibration", data, *formats)
        assert answer(capsys, "validate", model, str(out), "--dataset_name", data)["images"] == 12


def test_images_of_the_calibration_are_left_out_or_warned_of(
    fp32: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 2)), str(tmp_path / "run")
    quantize = ["quantize", fp32, out, "--calibration", data]
    validate = ["validate", fp32, out, "--dataset_name", data]
    answer(capsys, *quantize, "--calibration_images", "8", "--calibration_split", "train[:12]")
    assert json.loads((tmp_path / "run" / "fliqs/settings.json").read_text())["calibration_split"] == "train[0:12]"
    found = answer(capsys, *validate)
    assert found["images"] == 16
    assert found["conditions"]["warnings"] == ["8 of 24 images, which the model was calibrated on, are left out"]
    images = calibration(fp32, data, "--calibration_images", "8", "--calibration_split", "train[:12]")._images
    used = [int(str(images[index][1]).split()[1]) for index in range(8)]
    rest, _ = to_validate(out, data, None)
    assert sorted([*used, *rest["__row__"]]) == list(range(24))

    found = answer(capsys, *validate, "--split", "train", "--output", str(tmp_path / "page.html"))
    assert found["images"] == 24
    (warning,) = found["conditions"]["warnings"]
    assert "12 of the 24 images are of 'train[0:12]' of 'photos', 8 of which the model was calibrated on" in warning
    assert str(tmp_path) not in warning and "8 of which" in (tmp_path / "page.html").read_text()
    assert main([*validate, "--split", "train[12:]"]) == 0
    assert "calibrated on" not in capsys.readouterr().out

    answer(capsys, *quantize, "--overwrite")  # all of them: too few others are left
    found = answer(capsys, *validate)
    assert found["images"] == 24 and "24 of which" in found["conditions"]["warnings"][0]


def test_what_a_search_was_trained_with_is_left_out(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos", dict.fromkeys(NUMBERS, 2))
    record = {"dataset_name": data, "train_val_split": 0.25, "seed": 3, "validation_split": None}
    (tmp_path / "run" / "fliqs").mkdir(parents=True)
    (tmp_path / "run" / "fliqs/settings.json").write_text(json.dumps(record))
    held_out, warnings = to_validate(str(tmp_path / "run"), data, None)
    assert len(held_out) == 6 and "18 of 24 images, which the model was trained and searched with" in warnings[0]
    whole, warnings = to_validate(str(tmp_path / "run"), data, "train")
    assert len(whole) == 24 and "most of which the model was trained" in warnings[0]
    (tmp_path / "run" / "fliqs/settings.json").write_text(
        json.dumps({**record, "dataset_name": None, "train_dir": data})
    )
    assert "trained" in to_validate(str(tmp_path / "run"), data, None)[1][0]
    assert to_validate(str(tmp_path / "run"), "digits", None)[1] == []


def test_faults_of_data_show_before_the_training(
    fp32: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = photos(tmp_path / "photos", {"0": 9, "1": 9})
    search = [
        "search",
        "--train_dir",
        data,
        "--use_cpu",
        "--output_dir",
        str(tmp_path / "run"),
        "--finetune_steps",
        "9",
    ]
    scratch = [*search, "--model_type", "vit", "--config_overrides"]
    assert "leave num_labels=3 out" in failure(capsys, *scratch, "{num_labels: 3}")
    several = save(tmp_path / "several", num_labels=2, problem_type="multi_label_classification")
    assert "problem_type='multi_label" in failure(capsys, *search, "--model_name_or_path", several)
    for file in Path(data).rglob("*.png"):
        file.write_bytes(b"no image")
    assert "cannot be read" in failure(capsys, *search, "--model_name_or_path", fp32)
    assert not (tmp_path / "run" / "fliqs/fp32").exists()
