"""Compare ways of choosing formats at equal cost, equal steps and equal starting weights.

    python recipes/bench/compare.py runs/digits/fp32 --dataset_name digits --target_bits 2.5 3 4 5 --seeds 0 1 2 3 4 \\
        --max_steps 400 --output recipes/bench/results/compare-digits.csv

Every cost is recomputed by one cost model. Rows that the CSV has already are not run again. Methods:

    uniform-int, uniform-fp        QAT in INTk and the smallest float of k bits (k whole)
    ptq-uniform-int, -fp           the same without training
    manual                         first and last layer 8 bits, rest INTk; its cost is what it is
    random, random-no-int2         random allocation at the target, then QAT
    loss-delta, fisher             sensitivity, integer program, then QAT
    ptq-fisher                     the same without training
    search                         the one-shot search, default preset
    search-EXPLORE                 with another explore_fraction, e.g. search-0.3
    search-…-xN -hE -kK -lR        with N allocations per step, prior entropy E or strength K, policy learning rate R
    paper                          FLIQS as published
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging as hf_logging

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines import loss_delta_scores, manual, random_allocation, uniform
from fliqs_hf.cost import CostTable, Target, bops, trace_layers
from fliqs_hf.nn import make_searchable, restore
from fliqs_hf.search import OneShotSearch, SearchConfig, SearchSpace, best_choice, fisher_scores
from fliqs_hf.search.hook import FixedFormats, SearchHook
from fliqs_hf.search.run import versions
from fliqs_hf.training import ImageData, TrainConfig, evaluate, load_splits, train
from fliqs_hf.training.data import train_loader

METHODS = ("uniform-int", "uniform-fp", "random-no-int2", "loss-delta", "fisher", "search", "paper")
FLOATS = {3: "e2m0", 4: "e2m1", 5: "e2m2", 6: "e2m3", 7: "e3m3", 8: "e4m3"}
COLUMNS = ("method", "target_bits", "seed", "top1", "loss", "cost_ratio", "steps", "seconds", "peak_mb", "allocation")


class Comparison:
    """One starting checkpoint, one data set, one search space."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.accelerator = Accelerator(cpu=arguments.use_cpu)
        self.model = AutoModelForImageClassification.from_pretrained(arguments.model)
        self.model.to(self.accelerator.device)
        processor = AutoImageProcessor.from_pretrained(arguments.model)
        splits = load_splits(arguments.dataset_name)
        labels = self.model.config.num_labels
        limits = (arguments.max_train_samples, arguments.max_eval_samples)
        self.train, self.eval = (
            ImageData(split, processor, labels, max_samples=limit, cache=True)
            for split, limit in zip(splits, limits, strict=True)
        )
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.layers = trace_layers(self.model, self.train[0][0][None].to(self.accelerator.device))
        self.space = SearchSpace(self.layers, arguments.search_space)
        self.table = CostTable(self.layers, self.space.formats)
        self.scores: dict[str, tuple[torch.Tensor, float]] = {}

    def sensitivity(self, method: str, seed: int) -> tuple[torch.Tensor, float]:
        """Scores of the fp32 model and the seconds they took; `seed` chooses the images."""
        key = f"{method}-{seed}"
        if key not in self.scores:
            self.model.load_state_dict(self.original)
            batch = self.arguments.batch_size
            images = self.arguments.prior_images if method == "fisher" else min(512, self.arguments.prior_images)
            loader = train_loader(self.train, batch, seed, 0, -(-images // batch), 0, 1, 0)
            batches = [(x.to(self.accelerator.device), y.to(self.accelerator.device)) for x, y in loader]
            start = time.perf_counter()
            forward = lambda x: self.model(x).logits  # noqa: E731
            if method == "fisher":
                scores = fisher_scores(self.model, batches, forward, self.space).decision_scores
            else:
                scores = loss_delta_scores(self.model, batches, forward, self.space)
            self.scores[key] = scores, time.perf_counter() - start
        return self.scores[key]

    def program(self, scores: torch.Tensor, target: float, band: float = 0.03) -> Allocation:
        return self.space.allocation(
            best_choice(self.space, self.table, -scores, low=(1 - band) * target, high=target)
        )

    def settings(self, seed: int, quality: str = "loss") -> TrainConfig:
        a = self.arguments
        return TrainConfig(
            max_steps=a.max_steps, batch_size=a.batch_size, learning_rate=a.learning_rate, seed=seed, quality=quality
        )

    def run(self, method: str, bits: float, seed: int) -> dict[str, Any]:
        target = Target.of(target_bits=bits)
        cost = target.resolve(self.table)
        start = time.perf_counter()
        spent_before = 0.0
        allocation, search = None, None
        if method.removeprefix("ptq-") in ("uniform-int", "uniform-fp"):
            name = f"int{bits:g}" if method.endswith("int") else FLOATS.get(bits, "none")  # type: ignore[call-overload]
            allocation = uniform(self.layers, name)
        elif method == "manual":
            allocation = manual(self.layers, f"int{bits:g}")
        elif method.startswith("random"):
            space, table = self.space, self.table
            if method == "random-no-int2":
                space = SearchSpace(self.layers, [f for f in self.space.formats if f.name != "int2"])
                table = CostTable(self.layers, space.formats)
            allocation = random_allocation(space, table, cost, seed)
        elif method.removeprefix("ptq-") in ("loss-delta", "fisher"):
            scores, spent_before = self.sensitivity(method.removeprefix("ptq-"), seed)
            allocation = self.program(scores, cost)
        else:
            search = self.search(method, target, seed)
            if search.config.prior == "fisher":
                scores, spent_before = self.sensitivity("fisher", seed)
                search.start_from(scores)
        self.model.load_state_dict(self.original)
        formats = {
            *self.space.formats,
            *(f for pair in (allocation or {}).values() for f in (pair.weight, pair.activation) if f),
        }
        order = list(self.space.formats) if search else sorted(formats, key=lambda f: f.name)
        groups = {layer.name: layer.input_group for layer in self.layers} if search or allocation else {}
        switch = make_searchable(self.model, order, names=[layer.name for layer in self.layers], input_groups=groups)
        hook = SearchHook(search, switch) if search else FixedFormats(switch, allocation)  # type: ignore[arg-type]
        steps = 0 if method.startswith("ptq-") else self.arguments.max_steps
        if steps:
            quality = search.config.quality if search else "loss"
            train(
                self.model,
                self.train,
                self.settings(seed, quality),
                self.accelerator,
                hook=hook,
                name=f"{method} {bits:g} #{seed}",
            )
        if search:
            allocation = search.finalize().allocation
        assert allocation is not None
        switch.set_allocation(allocation)
        accuracy = evaluate(self.model, self.eval, self.accelerator)
        restore(self.model)
        return {
            "method": method,
            "target_bits": f"{bits:g}",
            "seed": seed,
            "top1": round(accuracy.top1, 5),
            "loss": round(accuracy.loss, 5),
            "cost_ratio": round(bops(self.layers, allocation) / cost, 4),
            "steps": steps,
            "seconds": round(time.perf_counter() - start + spent_before, 1),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
            "allocation": allocation.summary(),
        }

    def search(self, method: str, target: Target, seed: int) -> OneShotSearch:
        names = {"x": "samples_per_step", "h": "prior_entropy", "k": "prior_strength", "l": "policy_learning_rate"}
        changes: dict[str, Any] = {}
        preset = "paper" if method == "paper" else "default"
        for part in method.split("-")[1:]:
            name = names.get(part[0], "explore_fraction")
            value = float(part.lstrip("xhkl"))
            changes[name] = int(value) if name == "samples_per_step" else value
        config = SearchConfig.preset(preset, **changes)
        return OneShotSearch(
            self.space, self.table, target, config, self.arguments.max_steps, seed=seed, device=self.accelerator.device
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the fp32 checkpoint that everything starts from")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--target_bits", nargs="+", type=float, default=[3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--search_space", default="mixed")
    parser.add_argument("--max_steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--prior_images", type=int, default=1536)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="CSV to add to")
    arguments = parser.parse_args()
    hf_logging.disable_progress_bar()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {
        (r["method"], r["target_bits"], r["seed"])
        for r in csv.DictReader(line for line in lines if not line.startswith("#"))
    }
    comparison = Comparison(arguments)
    with arguments.output.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not lines:
            file.write(f"# python recipes/bench/compare.py {' '.join(sys.argv[1:])}\n# {versions()}\n")
            fp32 = evaluate(comparison.model, comparison.eval, comparison.accelerator)
            file.write(f"# fp32: top1 {fp32.top1:.4f}, loss {fp32.loss:.4f}, {fp32.n} images\n")
            writer.writeheader()
        for bits in arguments.target_bits:
            for seed in arguments.seeds:
                for method in arguments.methods:
                    whole = bits == int(bits) and int(bits) in FLOATS
                    if (method, f"{bits:g}", str(seed)) in done or (
                        not whole and ("uniform" in method or method == "manual")
                    ):
                        continue
                    writer.writerow(row := comparison.run(method, bits, seed))
                    file.flush()
                    print({key: row[key] for key in COLUMNS[:8]}, flush=True)


if __name__ == "__main__":
    main()
