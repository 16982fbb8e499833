"""What each post-training option is worth: accuracy of one model in uniform formats, calibrated without labels.

    python recipes/bench/ptq.py ../shared/data/deit-tiny-imagenet --dataset_name ../shared/data/imagenet-sample \\
        --calibration 256 --output recipes/bench/results/ptq-deit-tiny.csv

A seeded part of the images calibrates, the others are reported on. Every Linear and Conv2d is quantized, weights and
inputs alike, or as weight/input says. Rows that the CSV has already are not run again. INT4, where most is at stake,
gets every case.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as hf_logging

from fliqs_hf import Allocation
from fliqs_hf.files import write_text
from fliqs_hf.formats import parse
from fliqs_hf.formats.spaces import with_zero_point
from fliqs_hf.nn import quantizable_layers
from fliqs_hf.pipeline.outputs import check_result_file
from fliqs_hf.ptq import calibrate, rotate
from fliqs_hf.runs.folder import versions

NEAREST: dict[str, Any] = {"rounding": "nearest"}
GPTQ: dict[str, Any] = {"bias_correction": False, "weight_scale": "mse"}
BIAS: dict[str, Any] = {"bias_correction": True, "weight_scale": "mse"}
OUTPUT: dict[str, Any] = {"bias_correction": False, "weight_scale": "output"}
CASES: dict[str, dict[str, Any]] = {
    "nearest, absmax scale": {**NEAREST, "weight_scale": "absmax"},
    "nearest": NEAREST,
    "nearest + bias": NEAREST | BIAS,
    "gptq": GPTQ,
    "gptq + bias": BIAS,
    "gptq, clipped inputs": GPTQ | {"activations": "clipped"},
    "gptq, scales by output": OUTPUT,
    "zero points": OUTPUT,
    "rotation": OUTPUT,
    "rotation, zero points": OUTPUT,
}
CURES = ("gptq, scales by output", "rotation")
ENDS = ("nearest, absmax scale", "gptq", "gptq + bias", "gptq, clipped inputs", *CURES)
SCALES: dict[str, dict[str, Any]] = {
    "mse": {"activations": "mse"},
    "absmax": {"activations": "absmax"},
    "99.99 %": {"activations": "percentile", "percentile": 99.99},
    "99.9 %": {"activations": "percentile", "percentile": 99.9},
}
STATIC = {
    f"{case}, static {scale}": CASES[case] | options
    for scale, options in SCALES.items()
    for case in ("gptq", "gptq + bias")
}
#: Cases of each format.
TABLE = {
    "int4": (*CASES, *STATIC),
    "int8": (*ENDS, *STATIC),
    "e2m1": tuple(case for case in CASES if "zero points" not in case),
    "int4/int8": (*ENDS, "nearest"),
    "int6": ENDS,
    "e4m3": ENDS,
    "e2m3": ENDS,
}
COLUMNS = ("format", "case", "top1", "agreement", "images", "calibration_s")


def read(dataset: str, processor: Any, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixel values [images, 3, height, width] and labels of the only split, or of its first `count` images."""
    rows = load_dataset(dataset, split="train" if count is None else f"train[:{count}]")
    pixels = [processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"] for row in rows]
    return torch.cat(pixels), torch.tensor(rows["label"])


@torch.no_grad()
def predict(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(batch).logits.argmax(-1) for batch in images.split(31)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an fp32 image classifier")
    parser.add_argument("--dataset_name", required=True, help="images with labels, split `train`")
    parser.add_argument("--calibration", type=int, default=256, help="images to calibrate on")
    parser.add_argument("--seed", type=int, default=0, help="which images calibrate")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    check_result_file(arguments.output, lambda head: "recipes/bench/ptq.py" in head)
    hf_logging.disable_progress_bar()
    images, labels = read(arguments.dataset_name, AutoImageProcessor.from_pretrained(arguments.model))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed))
    images, labels = images[order], labels[order]
    given, images = images[: arguments.calibration], images[arguments.calibration :]
    labels = labels[arguments.calibration :]
    reference = predict(AutoModelForImageClassification.from_pretrained(arguments.model), images)

    if not arguments.output.exists():
        head = (
            " ".join(["python", "recipes/bench/ptq.py", *sys.argv[1:]]),
            versions(),
            f"{platform.machine()}, {torch.get_num_threads()} threads; seconds: machine under varying load",
            f"fp32: top1 {float((reference == labels).float().mean()):.4f}, {len(images)} images; "
            f"calibrated on {len(given)} others",
        )
        write_text(arguments.output, "".join(f"# {line}\n" for line in head) + ",".join(COLUMNS) + "\n")
    lines = [line for line in arguments.output.read_text().splitlines() if not line.startswith("#")]
    done = {(row["format"], row["case"]) for row in csv.DictReader(lines)}
    for fmt, cases in TABLE.items():
        for case in cases:
            if (fmt, case) in done:
                continue
            model = AutoModelForImageClassification.from_pretrained(arguments.model)
            start = time.perf_counter()
            if "rotation" in case:
                rotate(model, given[:4])
            weight, *activation = map(parse, fmt.split("/"))
            inputs = activation[0] if activation else weight
            inputs = with_zero_point(inputs) if "zero points" in case else inputs
            allocation = Allocation.uniform(quantizable_layers(model), weight, inputs)
            calibrate(model, allocation, given.split(32), **(CASES | STATIC)[case])
            seconds = time.perf_counter() - start
            found = predict(model, images)
            accuracy, agreement = (float((found == other).float().mean()) for other in (labels, reference))
            with arguments.output.open("a", newline="") as file:
                row = (fmt, case, round(accuracy, 4), round(agreement, 4), len(images), round(seconds, 1))
                csv.writer(file, lineterminator="\n").writerow(row)
            print(*row, sep=", ", flush=True)


if __name__ == "__main__":
    main()
