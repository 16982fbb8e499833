"""What a searchable model costs against plain fp32: time of a training step, activation memory, peak memory, files.

    python recipes/bench/step.py ../shared/data/deit-tiny-imagenet --batch_size 16 --rounds 9

A step is forward, backward and, in a search, all that the policy does: sampling, rewards, its update. The update
of the weights is the same for all and left out, which makes ratios larger. Times are medians of interleaved rounds
in one process, given as ratios to the fp32 step of the same round. Activation memory is what autograd saves for
backward, each storage counted once, without the parameters. Peak memory is the growth of the resident set over one
step in a fresh process per case. With --compiled there are two more cases, fp32 and search by `torch.compile`
(Inductor), and nothing else than times is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from inference import conditions
from torch.nn import functional
from transformers import AutoModelForImageClassification

from fliqs_hf import Allocation, FLIQSConfig, quantize
from fliqs_hf.cost import CostTable, Target, trace_layers
from fliqs_hf.files import write_text
from fliqs_hf.nn import QuantizerSettings, make_searchable, quantizable_layers
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import FixedFormats, SearchHook
from fliqs_hf.pipeline.outputs import check_result_file
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.timing import interleaved, ratios
from fliqs_hf.training import StepHook

UNIFORM = ("int4", "e2m1", "e4m3", "int8")
#: "search": other formats at each step. "pairs": two allocations per step, the second without a backward pass.
#: "clipped": as "search", with learned factors on the scales of inputs.
CASES = ("fp32", *UNIFORM, "search", "pairs", "clipped")
COMPILED = ("compiled fp32", "compiled search")
STEPS = 1000  # of the search, more than are run


class Case:
    """A model with what is done around its steps."""

    def __init__(self, path: str, name: str) -> None:
        self.model = AutoModelForImageClassification.from_pretrained(path).train()
        self.hook: StepHook | None = None
        self.run: Any = torch.compile(self.model, dynamic=False) if name in COMPILED else self.model
        self.steps = 0
        name = name.removeprefix("compiled ")
        if name == "fp32":
            return
        layers = trace_layers(self.model)
        space = SearchSpace(layers, [name] if name in UNIFORM else "mixed")
        settings = QuantizerSettings(activation_granularity="per_token_clipped" if name == "clipped" else "per_token")
        groups = {layer.name: layer.input_group for layer in layers}
        switch = make_searchable(self.model, space.formats, input_groups=groups, settings=settings)
        if name in UNIFORM:
            self.hook = FixedFormats(switch, Allocation.uniform(switch.names, name))
            return
        config = SearchConfig(prior="none", explore_fraction=1.0, samples_per_step=1 + (name == "pairs"))
        problem = SearchProblem(space, CostTable(layers, space.formats), Target.of(target_bits=4))
        search = OneShotSearch(problem, config, STEPS)
        self.hook = SearchHook(search, switch)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        passes = self.hook.begin_step(self.steps) if self.hook else [lambda: None]
        losses = []
        for index, set_formats in enumerate(passes):
            set_formats()
            with torch.set_grad_enabled(index == 0):
                loss = functional.cross_entropy(self.run(images).logits, labels)
            if index == 0:
                loss.backward()
            losses.append(loss.detach())
        if self.hook:
            self.hook.end_step(self.steps, -torch.stack(losses))
        self.steps += 1
        for parameter in self.model.parameters():
            parameter.grad = None


def saved_bytes(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> int:
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, labels=labels).loss
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def peak(path: str, case: str, batch_size: int) -> int:
    """Bytes by which one process grows over its steps (a fresh process, so that nothing is left from another case)."""
    command = [sys.executable, __file__, path, "--batch_size", str(batch_size), "--peak_of", case]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.strip().splitlines()[-1])


def measure_peak(path: str, case: str, images: torch.Tensor, labels: torch.Tensor) -> int:
    built = Case(path, case)
    before = resident_peak()
    for _ in range(3):
        built.step(images, labels)
    return resident_peak() - before


def resident_peak() -> int:
    """Largest resident set of this process so far, bytes (Linux; `ru_maxrss` would inherit the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def files(path: str) -> dict[str, float]:
    """Size and load time of the INT4 checkpoint against the fp32 one."""
    model = AutoModelForImageClassification.from_pretrained(path)
    layers = quantizable_layers(model)
    total = sum(p.numel() for p in model.parameters())
    quantized = sum(layer.weight.numel() for layer in layers.values())
    floor = quantized * 4 / 8 + (total - quantized) * 4
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/fp32")
        quantize(copy.deepcopy(model), Allocation.uniform(layers, "int4", "int8")).save_pretrained(f"{folder}/int4")
        quantize(model, FLIQSConfig(weight_format="int8")).save_pretrained(f"{folder}/int8")
        size = {name: os.path.getsize(f"{folder}/{name}/model.safetensors") for name in ("fp32", "int4", "int8")}
        load_from = AutoModelForImageClassification.from_pretrained
        seconds = interleaved({name: partial(load_from, f"{folder}/{name}") for name in size}, 7, warm_up=0)
    load = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "fp32_bytes": size["fp32"],
        "int4_bytes": size["int4"],
        "int4_bytes_over_sum_numel_bits_8": size["int4"] / floor,
        "int4_bytes_over_all_parameters_at_4_bits": size["int4"] / (total / 2),
        "fp32_over_int4_bytes": size["fp32"] / size["int4"],
        "fp32_load_s": load["fp32"],
        "int4_load_over_fp32": load["int4"] / load["fp32"],
        "int8_load_over_fp32": load["int8"] / load["fp32"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of an fp32 image classifier")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the results to this JSON file")
    parser.add_argument("--compiled", action="store_true", help="time compiled steps, which takes minutes to compile")
    parser.add_argument("--peak_of", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.output:
        check_result_file(arguments.output, lambda head: "recipes/bench/step.py" in head)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    images, labels = (
        torch.randn(arguments.batch_size, 3, 224, 224),
        torch.zeros(arguments.batch_size, dtype=torch.long),
    )
    if arguments.peak_of:
        print(measure_peak(arguments.model, arguments.peak_of, images, labels))
        return

    names = ("fp32", "search", *COMPILED) if arguments.compiled else CASES
    cases = {name: Case(arguments.model, name) for name in names}
    steps = {name: partial(case.step, images, labels) for name, case in cases.items()}
    times = interleaved(steps, arguments.rounds, warm_up=2)
    if arguments.compiled:
        report(compiled_times(times), arguments.output)
        return
    saved = {name: saved_bytes(case.model, images, labels) for name, case in cases.items()}
    peaks = {case: peak(arguments.model, case, arguments.batch_size) for case in CASES}
    ratio = {case: over(times, case, "fp32") for case in CASES}
    result = {
        "fp32_step_s": statistics.median(times["fp32"]),
        "step_over_fp32": ratio,
        "step_over_uniform_qat": {
            case: {name: ratio[case] / ratio[name] for name in UNIFORM} for case in ("search", "pairs")
        },
        "saved_activations_over_fp32": {case: saved[case] / saved["fp32"] for case in CASES},
        "peak_over_fp32": {case: peaks[case] / peaks["fp32"] for case in CASES},
        "search_peak_over_uniform_qat": peaks["search"] / peaks["e4m3"],
        "files": files(arguments.model),
    }
    report(result, arguments.output)


def over(times: dict[str, list[float]], case: str, base: str) -> float:
    """Median of the ratios of the rounds."""
    return statistics.median(ratios(times[case], times[base]))


def compiled_times(times: dict[str, list[float]]) -> dict[str, Any]:
    compiled = ratios(times["compiled search"], times["compiled fp32"])
    return {
        "fp32_step_s": statistics.median(times["fp32"]),
        "step_over_fp32": {case: over(times, case, "fp32") for case in times},
        "compiled_search_over_compiled_fp32": statistics.median(compiled),
        "its_quartiles": statistics.quantiles(compiled, n=4)[::2],
    }


def report(result: dict[str, Any], output: Path | None) -> None:
    command = " ".join(["python", "recipes/bench/step.py", *sys.argv[1:]])
    text = json.dumps({"command": command, "conditions": conditions(), **result}, indent=2)
    print(text)
    if output:
        write_text(output, text + "\n")


if __name__ == "__main__":
    main()
