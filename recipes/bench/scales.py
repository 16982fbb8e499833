"""What the granularity of scales is worth: top-1 of one model in uniform formats, rounded to nearest, untrained.

    python recipes/bench/scales.py ../shared/data/deit-tiny-imagenet --dataset_name ../shared/data/imagenet-sample \\
        --images 500 --output recipes/bench/results/scales-deit-tiny.csv

Every Linear is quantized, weights and inputs, as weight/input says; absmax scales, no calibration. Bits are those of a
weight of this model with its share of all scales. Rows that the CSV has already are not run again.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from pathlib import Path

import torch
from ptq import predict, read
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as hf_logging

from fliqs_hf import Allocation, FLIQSConfig, quantize
from fliqs_hf.files import write_text
from fliqs_hf.nn import packed_layers, quantizable_layers
from fliqs_hf.pipeline.outputs import check_result_file
from fliqs_hf.runs.folder import versions

PAIRS = (
    "int4/int4", "int4/int4_zp", "int4_g32/int4_g32", "mxfp4/mxfp4", "nvfp4/nvfp4", "int4_g32/int4_g32_zp",
    "e2m1/e2m1", "int4_g128/int4_g128", "mxfp6_e2m3/mxfp6_e2m3", "mxfp6_e3m2/mxfp6_e3m2", "int8/int8",
    "mxfp8_e4m3/mxfp8_e4m3", "mxfp8_e5m2/mxfp8_e5m2", "mxint8/mxint8",
)  # fmt: skip
COLUMNS = ("weight", "input", "bits", "top1", "agreement", "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an fp32 image classifier")
    parser.add_argument("--dataset_name", required=True, help="images with labels, split `train`")
    parser.add_argument("--images", type=int, default=500, help="the first ones")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    check_result_file(arguments.output, lambda head: "recipes/bench/scales.py" in head)
    hf_logging.disable_progress_bar()
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    images, labels = read(arguments.dataset_name, processor, arguments.images)
    reference = predict(AutoModelForImageClassification.from_pretrained(arguments.model), images)
    if not arguments.output.exists():
        head = (
            " ".join(["python", "recipes/bench/scales.py", *sys.argv[1:]]),
            versions(),
            f"{platform.machine()}, {torch.get_num_threads()} threads",
            f"fp32: top1 {float((reference == labels).float().mean()):.4f}, {len(images)} images",
        )
        write_text(arguments.output, "".join(f"# {line}\n" for line in head) + ",".join(COLUMNS) + "\n")
    lines = [line for line in arguments.output.read_text().splitlines() if not line.startswith("#")]
    done = {(row["weight"], row["input"]) for row in csv.DictReader(lines)}
    for weight, activation in (pair.split("/") for pair in PAIRS):
        if (weight, activation) in done:
            continue
        model = AutoModelForImageClassification.from_pretrained(arguments.model)
        linear = [name for name, layer in quantizable_layers(model).items() if isinstance(layer, torch.nn.Linear)]
        quantize(model, FLIQSConfig(allocation=Allocation.uniform(linear, weight, activation), kernels="reference"))
        layers = packed_layers(model).values()
        stored = sum(layer.formats.weight.storage_bytes(layer.weight_shape) for layer in layers)
        bits = 8 * stored / sum(layer.weight_shape.numel() for layer in layers)
        found = predict(model, images)
        accuracy, agreement = (float((found == other).float().mean()) for other in (labels, reference))
        row = (weight, activation, round(bits, 3), round(accuracy, 4), round(agreement, 4), len(images))
        with arguments.output.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        print(*row, sep=", ", flush=True)


if __name__ == "__main__":
    main()
