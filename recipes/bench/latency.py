"""How well a table of layers' times predicts whole models: random allocations, measured against the sum.

    python recipes/bench/latency.py --sizes tiny small --batch_sizes 1 8 --output recipes/bench/results/latency.json

Allocations are drawn from a search space with one format per layer. On a machine that does nothing else, or with
--cpu_time. Models are DeiT shapes with random weights, as in `inference.py`: time does not depend on the values. The
table and the whole models are measured in one process, one after the other; rows give the error of each sum, predicted
over measured less one, with the bit operations beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from fliqs_hf import LayerFormats, quantize
from fliqs_hf.cost import bops, trace_layers
from fliqs_hf.pipeline.profiling import profile
from fliqs_hf.selection import SearchSpace
from fliqs_hf.timing import Clock, interleaved
from recipes.bench.inference import SIZES, conditions


def shaped(size: str) -> Any:
    hidden, heads, features = SIZES[size]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=features, num_hidden_layers=12,
        num_labels=1000,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@torch.no_grad()
def measure(
    size: str, batch_size: int, formats: list[str], allocations: int, rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    model = shaped(size)
    layers = trace_layers(model)
    pairs = [LayerFormats.of(fmt, fmt) for fmt in formats]
    table = profile(model, layers, pairs, batch_size=batch_size, rounds=rounds, clock=clock)
    cost = table.cost()
    space = SearchSpace(layers, formats)  # in which layers that read one tensor share its format
    draws = torch.randint(
        len(formats), (allocations, len(space.decisions)), generator=torch.Generator().manual_seed(0)
    )
    drawn = [space.allocation(choice) for choice in draws]
    models = [quantize(copy.deepcopy(model), allocation) for allocation in drawn]
    images = torch.randn(batch_size, 3, 224, 224)
    times = interleaved(
        {str(number): partial(each, images) for number, each in enumerate(models)}, rounds, clock=clock
    )
    rows = []
    for allocation, own in zip(drawn, times.values(), strict=True):
        low, median, high = statistics.quantiles((1e3 * seconds for seconds in own), n=4)
        predicted = cost.of(layers, allocation)
        rows.append({
            "size": size, "batch_size": batch_size, "measured_ms": median, "quartiles_ms": [low, high],
            "predicted_ms": predicted, "error": predicted / median - 1, "bops": bops(layers, allocation),
        })  # fmt: skip
    errors = sorted(abs(row["error"]) for row in rows)
    print(
        f"{size:6} {batch_size:3}  median error {statistics.median(errors):.1%}, largest {errors[-1]:.1%}", flush=True
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--formats", nargs="+", default=["int4", "int8", "e2m1", "e4m3"])
    parser.add_argument("--allocations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20, help="at least 3")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--cpu_time", action="store_true",
        help="of one thread, not of the clock on the wall: for machines that others use at the same time",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON file of results")
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 3")
    if threads := 1 if args.cpu_time else args.threads:
        torch.set_num_threads(threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    about = conditions() | {"time": "cpu" if args.cpu_time else "wall"}
    rows = [
        row
        for size in args.sizes
        for batch in args.batch_sizes
        for row in measure(size, batch, args.formats, args.allocations, args.rounds, clock)
    ]
    if args.output:
        args.output.write_text(json.dumps({"conditions": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
