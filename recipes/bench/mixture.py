"""What a step of differentiable search costs against one of one-shot search: CPU time and activation memory.

    python recipes/bench/mixture.py ../shared/data/deit-tiny-imagenet --batch_size 2 --rounds 5

A step is forward and backward pass and the update of the search; the optimizer of the weights is the same in all cases
and left out. Times are CPU times of one thread, medians of interleaved rounds in one process, as ratios to the fp32
step of the same round. Activation memory is what autograd saves for backward, as in `step.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import torch
import transformers
from step import saved_bytes
from transformers import AutoModelForImageClassification

from fliqs_hf.baselines.differentiable import DifferentiableConfig, DifferentiableHook, DifferentiableSearch
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.files import write_text
from fliqs_hf.formats import COMMON
from fliqs_hf.nn import make_searchable
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.pipeline.outputs import check_result_file
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.timing import interleaved, ratios
from fliqs_hf.training import StepHook

LOW_BIT = [fmt for fmt in COMMON if fmt.bits <= 8]
SPACES = {2: ["int4", "int8"], 4: ["int4", "e2m1", "int8", "e4m3"], len(LOW_BIT): LOW_BIT}
STEPS = 10**6  # never reached: every step is one of the search


def build(path: str, kind: str, formats: int) -> tuple[torch.nn.Module, StepHook | None]:
    model = AutoModelForImageClassification.from_pretrained(path).train()
    if kind == "fp32":
        return model, None
    layers = trace_layers(model)
    space = SearchSpace(layers, SPACES[formats])
    problem = SearchProblem(space, CostTable(layers, space.formats), Target.of(target_bits=5))
    groups = {layer.name: layer.input_group for layer in layers}
    switch = make_searchable(model, space.formats, names=[layer.name for layer in layers], input_groups=groups)
    if kind == "one-shot":
        config = SearchConfig(prior="none", explore_fraction=1.0)
        return model, SearchHook(OneShotSearch(problem, config, STEPS), switch)
    search = DifferentiableSearch(problem, DifferentiableConfig(explore_fraction=1.0), STEPS)
    return model, DifferentiableHook(search, model, switch)


def step(
    model: torch.nn.Module, hook: StepHook | None, images: torch.Tensor, labels: torch.Tensor, numbers: Iterator[int]
) -> None:
    n = next(numbers)
    if hook is not None:
        hook.begin_step(n)[0]()
    loss = model(images, labels=labels).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    if hook is not None:
        hook.end_step(n, -loss.detach()[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an fp32 image classifier")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    if arguments.output:
        check_result_file(arguments.output, lambda head: "recipes/bench/mixture.py" in head)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {"fp32": build(arguments.model, "fp32", 0)}
    for formats in SPACES:
        for kind in ("one-shot", "differentiable"):
            cases[f"{kind}, {formats} formats"] = build(arguments.model, kind, formats)
    config = cases["fp32"][0].config
    images = torch.randn(arguments.batch_size, config.num_channels, config.image_size, config.image_size)
    labels = torch.zeros(arguments.batch_size, dtype=torch.long)

    steps = {case: partial(step, *pair, images, labels, count()) for case, pair in cases.items()}
    times = interleaved(steps, arguments.rounds, clock=time.process_time)
    saved = {}
    for case, (model, hook) in cases.items():
        if hook is not None:
            hook.begin_step(arguments.rounds + 1)[0]()
        saved[case] = saved_bytes(model, images, labels)
    result = {
        "command": " ".join(["python", "recipes/bench/mixture.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, 1 thread",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "fp32_step_cpu_s": statistics.median(times["fp32"]),
        "step_over_fp32": {case: statistics.median(ratios(times[case], times["fp32"])) for case in cases},
        "saved_activations_over_fp32": {case: saved[case] / saved["fp32"] for case in cases},
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
