"""Speed of packed models against fp32 and bf16, as ratios by taking turns in one process.

    python recipes/bench/inference.py --sizes tiny small base --batch_sizes 1 8 32 --output results.json

Models are DeiT shapes with random weights, 224 pixels, 1000 classes: time does not depend on the values. Each round
runs every case once; a ratio is that of a round's times, fp32 over the case, so more is faster. Rows give the median
and the quartiles over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

import fliqs_hf
from fliqs_hf import Allocation, FLIQSConfig, LayerFormats, kernels_of, set_kernels
from fliqs_hf.nn import native, quantizable_layers
from fliqs_hf.timing import Clock, interleaved, ratios
from fliqs_hf.validation.validate import processor_name

#: hidden size, heads, features of the MLP
SIZES = {"tiny": (192, 3, 768), "small": (384, 6, 1536), "base": (768, 12, 3072)}
PAIRS = {"w8a8": ("int8", "int8"), "w4a8": ("int4", "int8"), "e2m1": ("e2m1", "e2m1"), "e4m3": ("e4m3", "e4m3")}
#: What a search may give: layers in turn.
MIXED = ("int4", "e2m1", "int8", "e4m3")
WITHOUT = "w8a8, no compiler"
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
    names = list(quantizable_layers(plain))
    mixed = {name: LayerFormats.of(MIXED[i % 4], MIXED[i % 4]) for i, name in enumerate(names)}
    cases["mixed"] = fliqs_hf.quantize(copy.deepcopy(plain), Allocation(mixed))
    cases[WITHOUT] = copy.deepcopy(cases["w8a8"])
    cases["w8a8, reference"] = copy.deepcopy(cases["w8a8"])
    set_kernels(cases["w8a8, reference"], "reference")
    return cases


@contextlib.contextmanager
def compiled_or_not(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as patches:
        if name == WITHOUT:
            for module in (native.codes, native.int8):
                patches.enter_context(mock.patch.object(module, "library", return_value=None))
        yield


@torch.no_grad()
def measure(size: str, batch_size: int, rounds: int, clock: Clock) -> list[dict[str, Any]]:
    cases = models(size)
    images = torch.randn(batch_size, 3, 224, 224)
    inputs = {name: images.to(model.dtype if name == "bf16" else torch.float32) for name, model in cases.items()}
    passes = {name: partial(model, inputs[name]) for name, model in cases.items()}
    times = interleaved(passes, rounds, clock=clock, within=compiled_or_not)
    rows = []
    for name, model in cases.items():
        faster = ratios(times["fp32"], times[name])
        low, median, high = (round(value, 3) for value in statistics.quantiles(faster, n=4))
        kernels = Counter(choice.kernel for choice in kernels_of(model).values())
        rows.append({
            "size": size, "batch_size": batch_size, "case": name, "times_fp32": median, "quartiles": [low, high],
            "milliseconds": round(1e3 * statistics.median(times[name]), 2), "kernels": dict(kernels),
        })  # fmt: skip
        print(f"{size:6} {batch_size:3}  {name:17} {median:5.2f} × fp32  ({low:.2f} to {high:.2f})", flush=True)
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
        "threads": torch.get_num_threads(), "compiled": native.compiled.library() is not None,
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "fliqs_hf": fliqs_hf.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15, help="at least 3")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--cpu_time", action="store_true",
        help="of one thread, not of the clock on the wall: for machines that others use at the same time",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file of results")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 3")
    if args.cpu_time and args.threads not in (None, 1):
        parser.error(f"--cpu_time is of one thread, not of --threads {args.threads}")
    if threads := 1 if args.cpu_time else args.threads:
        torch.set_num_threads(threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    about = conditions() | {"time": "cpu" if args.cpu_time else "wall"}
    rows = [
        row for size in args.sizes for batch in args.batch_sizes for row in measure(size, batch, args.rounds, clock)
    ]
    if args.output:
        args.output.write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
