"""Options that are given and would have no effect: one line that names them, exit status 2, nothing loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fliqs_hf_cli
from fliqs_hf_cli import main
from tests.helpers.bad_input import filled, refused

MODEL = "{}/vit"
QUANTIZE = ["quantize", MODEL, "{}/out"]
IMAGES = [*QUANTIZE, "--calibration", "digits"]
FRONT = ["front", MODEL, "{}/out", "--calibration", "digits"]
PROFILE = ["profile", MODEL, "{}/out.json", "--estimate", "h100"]
CONFIG = ["export", MODEL, "{}/out", "--to"]
UNUSED: list[tuple[list[str], str]] = [
    # Also with the value that is the default.
    *(
        ([*PROFILE, f"--{option}", value], f"--{option} is for measuring, and --estimate measures nothing")
        for option, value in (("rounds", "20"), ("threads", "1"), ("device", "cpu"))
    ),
    *(
        ([*CONFIG, library, f"--{option}", value], f"--{option} is no setting of --to {library}")
        for library in ("torchao", "modelopt")
        for option, value in (
            ("dataset_name", "digits"), ("split", "test"), ("image_column", "img"), ("max_samples", "256"),
            ("batch_size", "32"), ("task", "image-classification"), ("min_agreement", "95"), ("opset", "21"),
        )
    ),
    ([*CONFIG, "torchao", "--include_preprocessing"], "--include_preprocessing is no setting of --to torchao"),
    ([*CONFIG, "onnx", "--max_samples", "256"], "--max_samples is about images: give them with --dataset_name"),
    ([*CONFIG, "onnx", "--batch_size", "32"], "--batch_size is about images: give them with --dataset_name"),
    *(
        ([*QUANTIZE, f"--{option}", value], f"--{option} is about images: give them with --calibration")
        for option, value in (("calibration_images", "512"), ("match_labels", "name"), ("batch_size", "32"))
    ),
    *(
        ([*IMAGES, f"--{option}", value], f"--{option} is for a floor: give --max_drop or --min_accuracy")
        for option, value in (
            ("held_out", "digits"), ("held_out_split", "train"), ("held_out_images", "1000"), ("confidence", "0.95"),
            ("floor_steps", "6"),
        )
    ),
    ([*IMAGES, "--max_drop", "1", "--weight_format", "int8", "--floor_steps", "6"], "those that are given are tested"),
    ([*IMAGES, "--label_column", "label"], "--label_column is about labels, which only a target or a floor asks for"),
    ([*IMAGES, "--match_labels", "index"], "--match_labels is about labels"),
    ([*IMAGES, "--activation_format", "none", "--activations", "mse"], "--activations is about inputs in formats"),
    *(
        ([*IMAGES, "--zero_points", "true", *more], f"--zero_points true has no effect with --{named}")
        for more, named in (
            (["--activation_format", "int4", "--activations", "mse"], "activations mse"),
            (["--activation_format", "int8"], "activation_format int8"),
            (["--activation_format", "e2m1"], "activation_format e2m1"),
            (["--activation_format", "none"], "activation_format none"),
            (["--weight_format", "int4"], "activation_format int8"),
            (["--allocation", "{}/vit/config.json"], "allocation, which says all formats"),
            (["--target_bits", "4", "--activation", "same"], "activation same"),
        )
    ),
    ([*QUANTIZE, "--task", "image-segmentation", "--calibration", "digits", "--match_labels", "index"],
     "match_labels='index' is for tasks with one class per image"),
    (["validate", MODEL, MODEL, "--dataset_name", "digits", "--task", "image-segmentation", "--match_labels", "index"],
     "match_labels='index' is for tasks with one class per image"),
    *(
        ([*FRONT, f"--{option}", value], f"--{option} is for measuring: give --measure")
        for option, value in (("held_out", "digits"), ("held_out_split", "train"), ("held_out_images", "1000"))
    ),
    (["hardware", "list", "h100"], "hardware list takes no name: leave 'h100' out"),
    *(
        (["hardware", *what, *option], f"{option[0]} is for hardware check, not for hardware {what[0]}")
        for what in (["list"], ["show", "h100"])
        for option in (["--hardware", "auto"], ["--revision", "main"])
    ),
]  # fmt: skip


@pytest.mark.usefixtures("_nothing_is_loaded")
@pytest.mark.parametrize(("arguments", "named"), UNUSED, ids=str)
def test_an_option_without_effect_is_refused(
    arguments: list[str], named: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    refused(main(filled(arguments, there)), *capsys.readouterr(), named)
    assert not (there / "out").exists()


def given(*arguments: str) -> Any:
    parser = fliqs_hf_cli.Parser()
    fliqs_hf_cli.add_commands(parser)
    return parser.parse_args(arguments).given


def test_what_is_given_is_known_whatever_its_value() -> None:
    assert given("quantize", "m", "o") == {"model", "output"}
    assert given("quantize", "m", "o", "--batch_size", "32", "--target", "bits=4", "--overwrite", "--json") == {
        "model", "output", "batch_size", "target", "overwrite", "json",
    }  # fmt: skip
    assert given("recommend", "m", "o", "--calibration", "d") == {"model", "output", "calibration"}
    assert given("hardware", "list") == {"what"}
