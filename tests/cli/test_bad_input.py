"""Mistakes of users in every command: one line that names them, exit status 2, nothing loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fliqs_hf_cli import main
from tests.helpers.bad_input import SOURCES, filled, refused

pytestmark = pytest.mark.usefixtures("_nothing_is_loaded")

# Arguments of commands, and what the message names. {} is the folder `there`.
MODEL = "{}/vit"
QUANTIZE = ["quantize", MODEL, "{}/out"]
FRONT = ["front", MODEL, "{}/out", "--calibration", "digits"]
VALIDATE = ["validate", MODEL, MODEL, "--dataset_name", "digits"]
COMPARE = ["compare", MODEL, "--dataset_name", "digits", "--output", "{}/out.csv"]
COMMANDS: list[tuple[list[str], str]] = [
    *((["estimate", source], named) for source, named in SOURCES),
    *((["quantize", source, "{}/out"], named) for source, named in SOURCES),
    *(
        (["validate", source, MODEL, "--dataset_name", "digits"], named.replace("model=", "original="))
        for source, named in SOURCES
    ),
    (["estimate", "{}/text"], "BertModel takes no images"),
    (["estimate", "{}/zero"], "makes no model"),
    (["estimate"], "required"),
    (["estimate", MODEL, "--image_size", "7"], "image_size=7 is no multiple of patch_size=8"),
    (["estimate", MODEL, "--image_size", "33"], "image_size=33"),
    (["estimate", MODEL, "--image_size", "0"], "image_size=0 must be at least 1"),
    (["estimate", MODEL, "--image_size", "-8"], "image_size=-8"),
    (["estimate", MODEL, "--image_size", "many"], "'many'"),
    (["estimate", MODEL, "--image_size", "9" * 30], "must be a finite number"),
    (["estimate", MODEL, "--formats", "int99x"], "int99x"),
    (["estimate", MODEL, "--formats", ""], "formats='' is empty"),
    (["estimate", MODEL, "--allocation", "{}/nowhere.json"], "nowhere.json"),
    (["estimate", MODEL, "--allocation", ""], "allocation='' is empty"),
    (["estimate", MODEL, "--modules_to_not_convert", "nothing*"], "nothing*"),
    (["estimate", MODEL, "--nonsense"], "--nonsense"),
    (["nonsense"], "'nonsense'"),
    (["formats", "int99x"], "int99x"),
    (["quantize", "{}/no_processor", "{}/out"], "image processor"),
    (["quantize", "{}/weightless", "{}/out"], "weightless"),
    (["quantize", MODEL, ""], "output='' is empty"),
    ([*QUANTIZE, "--weight_format", "int1"], "int1"),
    ([*QUANTIZE, "--activation_format", "x"], "'x'"),
    ([*QUANTIZE, "--target_bits", "nan", "--calibration", "digits"], "target_bits=nan"),
    ([*QUANTIZE, "--target_bits", "inf", "--calibration", "digits"], "target_bits=inf"),
    ([*QUANTIZE, "--target_bits", "0", "--calibration", "digits"], "target_bits=0.0 must be above 0"),
    ([*QUANTIZE, "--target_bits", "-4", "--calibration", "digits"], "target_bits=-4.0"),
    ([*QUANTIZE, "--target_bits", "33", "--calibration", "digits"], "at most 32"),
    ([*QUANTIZE, "--target_ratio", "2", "--calibration", "digits"], "target_ratio=2.0"),
    ([*QUANTIZE, "--target_size_mb", "-1", "--calibration", "digits"], "target_size_mb=-1.0"),
    ([*QUANTIZE, "--target_bops", "0", "--calibration", "digits"], "target_bops=0.0"),
    ([*QUANTIZE, "--calibration_images", "0"], "calibration_images=0"),
    ([*QUANTIZE, "--batch_size", "0"], "batch_size=0 must be at least 1"),
    ([*QUANTIZE, "--batch_size", "-1"], "batch_size=-1"),
    ([*QUANTIZE, "--calibration", ""], "calibration='' is empty"),
    *(
        ([*QUANTIZE, *option, *more], f"{option[0]} is about formats that are chosen: {named}")
        for option in (
            ["--require", "*=int8"],
            ["--min_bits", "*=4"],
            ["--score", "fisher"],
            ["--search_space", "int4", "int8"],
            ["--activation", "same"],
        )
        for more, named in (
            ([], "give a target or a floor, such as --target_bits 4 or --max_drop 0.5"),
            (["--calibration", "digits"], "give a target or a floor"),
            (["--weight_format", "int4"], "leave it out, or --weight_format, which says all formats"),
            (["--activation_format", "none"], "leave it out, or --activation_format, which says all"),
            (["--allocation", "a.json"], "leave it out, or --allocation, which says all"),
            (
                ["--weight_format", "int4", "--max_drop", "1", "--calibration", "digits"],
                "leave it out, or --weight_format, which",
            ),
        )
    ),
    *(
        ([*QUANTIZE, *option, *floor], "a floor is met with the help of images: give some with --calibration")
        for option in ([], ["--require", "*=int8"], ["--min_bits", "*=4"], ["--score", "fisher"])
        for floor in (["--max_drop", "1"], ["--min_accuracy", "0.5"])
    ),
    (
        [*QUANTIZE, "--score", "fisher", "--target_bits", "4"],
        "--target_bits chooses formats by their effect on images",
    ),
    ([*QUANTIZE, "--score", "x", "--max_drop", "1", "--calibration", "digits"], "'x'"),
    ([*QUANTIZE, "--calibration_split", "train"], "--calibration_split is about images: give them with --calibration"),
    ([*QUANTIZE, "--label_column", "fine"], "--label_column is about images"),
    ([*QUANTIZE, "--image_column", "img"], "--image_column is about images"),
    ([*QUANTIZE, "--held_out", "digits"], "--held_out is for a floor: give --max_drop or --min_accuracy"),
    ([*QUANTIZE, "--revision", "v2"], "revision='v2' is of models on the Hub"),
    (["export", MODEL, "{}/out", "--split", "test"], "--split is about images: give them with --dataset_name"),
    (["export", MODEL, "{}/out", "--image_column", "img"], "--image_column is about images"),
    ([*FRONT, "--held_out", "digits"], "--held_out is for measuring: give --measure"),
    ([*FRONT, "--held_out_split", "test"], "--held_out_split is for measuring"),
    ([*QUANTIZE, "--device", "foo"], "device='foo'"),
    ([*QUANTIZE, "--device", "cuda:99"], "device='cuda:99'"),
    ([*QUANTIZE, "--device", "cuda:-1"], "device='cuda:-1'"),
    ([*QUANTIZE, "--device", "meta"], "device='meta'"),
    ([*QUANTIZE, "--device", "cpu:3"], "device='cpu:3'"),
    ([*QUANTIZE, "--device", "mps:7"], "device='mps:7'"),
    ([*QUANTIZE, "--rounding", "up"], "'up'"),
    ([*QUANTIZE, "--allocation", "{}/vit/config.json"], "allocation"),
    ([*VALIDATE, "--device", "foo"], "device='foo'"),
    ([*VALIDATE, "--batch_size", "0"], "batch_size=0"),
    ([*VALIDATE, "--max_samples", "1"], "max_samples=1 must be at least 2"),
    ([*VALIDATE, "--max_drop", "nan"], "max_drop=nan"),
    ([*VALIDATE, "--max_drop", "-1"], "max_drop=-1.0"),
    ([*VALIDATE, "--max_drop", "101"], "max_drop=101.0"),
    ([*VALIDATE, "--confidence", "1"], "confidence=1.0"),
    ([*VALIDATE, "--confidence", "0.5"], "confidence=0.5"),
    ([*VALIDATE, "--output", "page.pdf"], "page.pdf"),
    (["validate", MODEL, MODEL, "--dataset_name", ""], "dataset_name='' is empty"),
    (["validate", MODEL, MODEL], "--dataset_name"),
    ([*COMPARE, "--seeds", "-1"], "seeds=-1"),
    ([*COMPARE, "--seeds", "1.5"], "'1.5'"),
    ([*COMPARE, "--max_steps", "0"], "max_steps=0"),
    ([*COMPARE, "--batch_size", "0"], "batch_size=0"),
    ([*COMPARE, "--learning_rate", "nan"], "learning_rate=nan"),
    ([*COMPARE, "--trials", "0"], "trials=0"),
    ([*COMPARE, "--target_bits", "0"], "target_bits=0.0"),
    ([*COMPARE, "--max_eval_samples", "0"], "max_eval_samples=0"),
    ([*COMPARE, "--methods", "magic"], "magic"),
    ([*COMPARE, "--distill", "2"], "distill=2.0"),
    ([*COMPARE, "--nonsense"], "--nonsense"),
    (["compare", "{}/empty", "--dataset_name", "digits", "--output", "{}/out.csv"], "holds no model"),
    (["compare", "{}/text", "--dataset_name", "digits", "--output", "{}/out.csv"], "cannot load the model"),
    (["report", ""], "run='' is empty"),
    (["inspect", ""], "checkpoint='' is empty"),
    (["push", "{}/vit", ""], "repo_id='' is empty"),
]


@pytest.mark.parametrize(("arguments", "named"), COMMANDS, ids=str)
def test_a_command_says_what_is_wrong(
    there: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    capsys.readouterr()
    status = main(filled(arguments, there))
    refused(status, *capsys.readouterr(), named)
    status = main([*filled(arguments, there), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 2 and named in found["error"]
    assert not (there / "out").exists()
