"""All that needs a GPU, in one command of at most nine minutes: tests, inference, search steps, two processes.

    python recipes/bench/gpu_all.py ../shared/data/deit-tiny-imagenet --output recipes/bench/results

Each part runs in a process of its own and has a share of the time, so that one that fails or hangs leaves the others.
What was found is written after every part, to `gpu-<name of the device>.json`. Times are medians of interleaved
rounds, measured by CUDA events; ratios are those of a round. Exit status: 0 if every part ran, 1 if one failed, 2
without a CUDA device.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from inference import conditions
from torch.nn import functional
from transformers import AutoModelForImageClassification, DeiTConfig, DeiTForImageClassification

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.files import write_text
from fliqs_hf.nn import make_searchable
from fliqs_hf.nn.kernels import kernels_of
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.selection import SearchProblem, SearchSpace

ROOT = Path(__file__).parents[2]
LIMIT_S = 530  # of the whole command
#: Most seconds of each part; what one leaves is there for the next ones.
PARTS = {"tests": 90, "inference": 80, "compiled": 90, "search": 30, "search_compiled": 180, "processes": 60}
BATCH_SIZES = (1, 64, 256)
PAIRS = {"w8a8": ("int8", "int8"), "w4a8": ("int4", "int8"), "w4a4": ("int4", "int4_zp"), "e4m3": ("e4m3", "e4m3")}
COMPILED_BATCH = 64
ROUNDS = 15


def interleaved(cases: dict[str, Callable[[], Any]]) -> dict[str, dict[str, float]]:
    """Median milliseconds of each case, and the median of its ratios to the first one, below 1 where it is faster."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(ROUNDS + 3):
        for name, run in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if round_ > 2:  # the first rounds compile and warm up
                times[name].append(start.elapsed_time(end))
    base = next(iter(times.values()))
    return {
        name: {
            "milliseconds": statistics.median(own),
            "over_first": statistics.median(a / b for a, b in zip(own, base, strict=True)),
        }
        for name, own in times.items()
    }


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """What `run` starts on the device, recorded once, so that a replay waits for no Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are built before they are recorded
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def models_of(plain: Any, names: Iterable[str]) -> dict[str, Any]:
    """The model in bf16 under "bf16", and packed under the names of `PAIRS`, all on the device and in bf16."""
    found = {"bf16": copy.deepcopy(plain).cuda().bfloat16()}
    for name in names:
        formats = FLIQSConfig(weight_format=PAIRS[name][0], activation_format=PAIRS[name][1])
        found[name] = fliqs_hf.quantize(copy.deepcopy(plain), formats).cuda().bfloat16()
    return found


def deit_base() -> Any:
    """Of random weights, which take the same time."""
    torch.manual_seed(0)
    return DeiTForImageClassification(DeiTConfig(num_labels=1000)).eval()


@torch.no_grad()
def inference(path: str) -> dict[str, Any]:
    """Models in bf16 and packed ones, as CUDA graphs and eagerly."""
    found: dict[str, Any] = {}
    for size, plain in (("tiny", AutoModelForImageClassification.from_pretrained(path).eval()), ("base", deit_base())):
        models, rows = models_of(plain, PAIRS), {}
        for batch_size in BATCH_SIZES:
            images = torch.randn(batch_size, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
            eager = {name: lambda m=model, x=images: m(x) for name, model in models.items()}
            graphs = {f"{name} graph": graph_of(run) for name, run in eager.items()}
            rows[batch_size] = interleaved(graphs | eager)
        kernels = {name: dict(Counter(c.kernel for c in kernels_of(models[name]).values())) for name in PAIRS}
        found[size] = {"batch_sizes": rows, "kernels": kernels}
    return found


@torch.no_grad()
def compiled(path: str) -> dict[str, Any]:
    """DeiT-Base, compiled. It takes half a minute for each model, so not in all formats and batch sizes."""
    images = torch.randn(COMPILED_BATCH, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    models = models_of(deit_base(), ("w8a8", "e4m3"))
    runs = {name: torch.compile(model, dynamic=False) for name, model in models.items()}
    return {"batch_size": COMPILED_BATCH, **interleaved({n: graph_of(lambda m=m: m(images)) for n, m in runs.items()})}


def search(path: str) -> dict[str, Any]:
    """Forward and backward passes and the policy's update: fp32, bf16, a search."""
    return _steps(path, compiled=False)


def search_compiled(path: str) -> dict[str, Any]:
    """The same, compiled."""
    return _steps(path, compiled=True)


def _steps(path: str, compiled: bool) -> dict[str, Any]:
    images = torch.randn(64, 3, 224, 224, device="cuda")
    labels = torch.zeros(64, dtype=torch.long, device="cuda")
    return interleaved({name: _step(path, name, compiled, images, labels) for name in ("fp32", "bf16", "search")})


def _step(path: str, name: str, compiled: bool, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], Any]:
    model = AutoModelForImageClassification.from_pretrained(path).cuda().train()
    hook: SearchHook | None = None
    if name == "search":
        layers = trace_layers(model)
        space = SearchSpace(layers, "mixed")
        groups = {layer.name: layer.input_group for layer in layers}
        switch = make_searchable(model, space.formats, names=list(groups), input_groups=groups)
        settings = SearchConfig(prior="none", explore_fraction=1.0)
        problem = SearchProblem(space, CostTable(layers, space.formats), Target.of(target_bits=4))
        hook = SearchHook(OneShotSearch(problem, settings, 1000, device="cuda"), switch)
    run: Any = torch.compile(model, dynamic=False) if compiled else model
    steps = iter(range(1000))

    def step() -> None:
        number = next(steps)
        if hook is not None:
            hook.begin_step(number)[0]()
        with torch.autocast("cuda", torch.bfloat16, enabled=name == "bf16"):
            loss = functional.cross_entropy(run(images).logits.float(), labels)
        loss.backward()
        if hook is not None:
            hook.end_step(number, -loss.detach()[None])
        model.zero_grad()

    return step


#: Parts that `--part` runs in a process of their own.
MEASURED = {"inference": inference, "compiled": compiled, "search": search, "search_compiled": search_compiled}


def command_of(part: str, path: str, scratch: Path) -> list[str]:
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-q", "-n", "4", "-m", "gpu", "tests/gpu"]
    if part == "processes":  # NCCL is what accelerate takes for GPUs
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "recipes/vit.py"]
        settings = [
            "digits",
            "--use_cpu",
            "false",
            "--finetune_steps",
            "10",
            "--max_steps",
            "20",
            "--output_dir",
            str(scratch / "run"),
        ]
        return [sys.executable, *launch, *settings]
    return [sys.executable, __file__, path, "--part", part, "--output", str(scratch)]


def run_part(part: str, path: str, seconds: float) -> dict[str, Any]:
    """What the part found, or how it failed."""
    if part == "processes" and torch.cuda.device_count() < 2:
        return {"skipped": f"needs two devices, there is {torch.cuda.device_count()}"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = command_of(part, path, Path(folder))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"not finished after {seconds:.0f} s"}
        took = {"seconds": round(time.monotonic() - start, 1)}
        last = (done.stdout + done.stderr).strip().splitlines()[-8:]
        if done.returncode:
            return {"failed": last, **took}
        found = Path(folder) / f"{part}.json"
        return {"found": json.loads(found.read_text()) if found.exists() else last, **took}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an fp32 image classifier for 224 pixels")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/bench/results", help="folder of the result")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="only these; others stay")
    parser.add_argument("--part", choices=list(MEASURED), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_all.py measures on a GPU, and torch finds no CUDA device here", file=sys.stderr)
        return 2
    if arguments.part:
        found = MEASURED[arguments.part](arguments.model)
        write_text(arguments.output / f"{arguments.part}.json", json.dumps(found))
        return 0
    device = torch.cuda.get_device_name()
    file = arguments.output / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower())}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    result |= {
        "command": " ".join(["python", "recipes/bench/gpu_all.py", *sys.argv[1:]]),
        "device": {"name": device, "count": torch.cuda.device_count(), "cuda": torch.version.cuda},
        "conditions": conditions(),
    }
    end = time.monotonic() + LIMIT_S
    for part in arguments.parts:
        result[part] = run_part(part, arguments.model, max(1.0, min(PARTS[part], end - time.monotonic())))
        print(f"{part}: {json.dumps(result[part])[:300]}", flush=True)
        write_text(file, json.dumps(result, indent=1) + "\n")
    return int(any("failed" in result[part] for part in arguments.parts))


if __name__ == "__main__":
    sys.exit(main())
