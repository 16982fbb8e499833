"""Speed of packed models against fp32 and bf16, as ratios by taking turns in one process.

    python recipes/bench/inference.py --sizes tiny small base --batch_sizes 1 8 32 --output results.json

Models are DeiT shapes with random weights, 224 pixels, 1000 classes: time does not depend on the values. Each round
runs every case once; a ratio is that of a round's times, fp32 over the case, so more is faster. Rows give the median
and the quartiles over rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.nn.kernels import kernels_of, set_kernels
from fliqs_hf.report.validate import processor_name

#: hidden size, heads, features of the MLP
SIZES = {"tiny": (192, 3, 768), "small": (384, 6, 1536), "base": (768, 12, 3072)}
PAIRS = {"w8a8": ("int8", "int8"), "w4a8": ("int4", "int8"), "w4a4": ("int4", "int4"), "e2m1": ("e2m1", "e2m1")}
#: Instruction sets that decide which kernels there are.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def models(size: str) -> dict[str, Any]:
    hidden, heads, features = SIZES[size]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=features, num_hidden_layers=12,
        num_labels=1000,
    )  # fmt: skip
    plain = ViTForImageClassification(config).eval()
    cases = {"fp32": plain, "bf16": copy.deepcopy(plain).to(torch.bfloat16)}
    for name, (weight, activation) in PAIRS.items():
        formats = FLIQSConfig(weight_format=weight, activation_format=activation)
        cases[name] = fliqs_hf.quantize(copy.deepcopy(plain), formats)
    cases["w8a8, reference"] = copy.deepcopy(cases["w8a8"])
    set_kernels(cases["w8a8, reference"], "reference")
    return cases


def seconds(model: Any, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


@torch.no_grad()
def measure(size: str, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    cases = models(size)
    images = torch.randn(batch_size, 3, 224, 224)
    inputs = {name: images.to(model.dtype if name == "bf16" else torch.float32) for name, model in cases.items()}
    for name, model in cases.items():
        seconds(model, inputs[name])  # prepares weights
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, model in cases.items():
            times[name].append(seconds(model, inputs[name]))
    rows = []
    for name, model in cases.items():
        ratios = [base / own for base, own in zip(times["fp32"], times[name], strict=True)]
        low, median, high = (round(value, 3) for value in statistics.quantiles(ratios, n=4))
        kernels = Counter(choice.kernel for choice in kernels_of(model).values())
        rows.append({
            "size": size, "batch_size": batch_size, "case": name, "times_fp32": median, "quartiles": [low, high],
            "milliseconds": round(1e3 * statistics.median(times[name]), 2), "kernels": dict(kernels),
        })  # fmt: skip
        print(f"{size:6} {batch_size:3}  {name:16} {median:5.2f} × fp32  ({low:.2f} to {high:.2f})", flush=True)
    return rows


def conditions() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    flags = (
        next((line.split() for line in file.read_text().splitlines() if line.startswith("flags")), [])
        if file.exists()
        else []
    )
    return {
        "cpu": processor_name(), "instructions": [name for name in INSTRUCTIONS if name in flags],
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "fliqs_hf": fliqs_hf.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15, help="at least 3")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--output", type=Path, help="JSON file of results")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 3")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = [row for size in args.sizes for batch in args.batch_sizes for row in measure(size, batch, args.rounds)]
    if args.output:
        args.output.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
