"""Ways of choosing formats compared at equal cost, equal steps and equal starting weights.

    {command} runs/digits/fliqs/fp32 --dataset_name digits --target_bits 3 4 --seeds 0 1 2 --output compare.csv

Writes one row per method, target and seed to the CSV, and beside it a table (.md) and a figure (.png). Every cost is
recomputed by one cost model. Rows that the CSV has already are not run again, so an interrupted comparison goes on.

Methods (those with ptq- in front do the same without training):
    uniform-int, uniform-fp        INTk, and the smallest float of k bits (k from 3 to 8)
    uniform-FORMAT                 any format, such as uniform-e4m3: whatever the targets are, it is run once per
                                   seed, and its row is one for a target of the format's own bits
    manual                         first and last layer 8 bits, the rest INTk; it costs what it costs
    random, random-no-int2         a random allocation at the target
    loss-delta                     sensitivity by the change of the loss, one evaluation per layer and format
    fisher                         sensitivity by the per-sample Fisher score, one backward pass for all
    elementwise                    sensitivity by element-wise squared gradients, as in ModelOpt
    hessian                        sensitivity by Hessian traces, as in HAWQ-V2
    lampq                          sensitivity by Fisher traces, levelled between types of layers, after LampQ
    two-pass                       the Fisher score, measured again in the model as its allocation quantizes it
                                   (each with the integer program, then training; so is every registered score)
    differentiable, gumbel         mixtures over format branches, EdMIPS and DNAS
    multi-trial-random, -optuna    short trainings of proposals, the best trained to the end
    search                         the one-shot search, default preset
    search-EXPLORE-xN-hE-kK-lR-pP  with another explore_fraction, allocations per step, prior entropy or strength,
                                   policy learning rate, passes of the prior (any of these)
    paper                          FLIQS as published
"""

from __future__ import annotations

import argparse
import copy
import glob
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from transformers.utils import logging as hf_logging

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines import (
    DifferentiableConfig,
    ShortTraining,
    baselines,
    differentiable_search,
    manual,
    multi_trial,
    random_allocation,
    uniform,
)
from fliqs_hf.baselines.multi_trial import is_journal
from fliqs_hf.checks import is_whole
from fliqs_hf.cost import CostTable, Target, bops, trace_layers
from fliqs_hf.errors import ConfigError, TargetError
from fliqs_hf.failures import status_of
from fliqs_hf.limits import check_values
from fliqs_hf.lock import locked
from fliqs_hf.nn import QuantizerSettings, make_searchable, restore
from fliqs_hf.oneshot import OneShotSearch
from fliqs_hf.oneshot.hook import FixedFormats, SearchHook
from fliqs_hf.pipeline.checkpoints import load_processor
from fliqs_hf.pipeline.compare_methods import (
    FLOATS,
    METHODS,
    RANDOM,
    UNIFORM,
    check_methods,
    is_search,
    runs,
    search_config,
    uniform_format,
)
from fliqs_hf.pipeline.compare_scores import Scores
from fliqs_hf.pipeline.compare_summary import is_summary, summarise, write_summary
from fliqs_hf.pipeline.compare_table import COLUMNS, Table, is_table, provenance
from fliqs_hf.pipeline.outputs import check_apart, check_result_file, data_source
from fliqs_hf.selection import SearchProblem, SearchSpace, scores
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, find_task
from fliqs_hf.training import StepHook, TrainConfig, evaluate, load_splits, train
from fliqs_hf.training.labels import match_given, names_of
from fliqs_hf.training.loading import load
from fliqs_hf.training.splits import at_most
from fliqs_hf.validation.comparison import peak_memory
from fliqs_hf.validation.data import check_match

#: Arguments that say which rows there are and where, not what is in them.
FREE = ("methods", "target_bits", "seeds", "output", "use_cpu")


class Comparison:
    """One starting checkpoint, one data set, one search space."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        default = max(1, arguments.max_steps // 4)
        self.trial_steps = default if arguments.trial_steps is None else arguments.trial_steps
        for seed in arguments.seeds:
            for steps in (arguments.max_steps, self.trial_steps):
                self.settings(seed=seed, steps=steps)  # refuses bad values before anything is loaded
        for name in ("trials", "prior_images"):
            if not is_whole(value := getattr(arguments, name), 1):
                raise ConfigError(f"--{name} {value} must be at least 1")
        self.task = find_task(arguments.task)
        self.accelerator = Accelerator(cpu=arguments.use_cpu)
        self.model = load(self.task.auto_class(), arguments.model)
        self.model.to(self.accelerator.device)
        self.teacher = copy.deepcopy(self.model) if arguments.distill or arguments.distill_features else None
        self.train, self.eval = self._data(load_processor(arguments.model))
        self.original = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.layers = trace_layers(self.model, self.train[0][0][None].to(self.accelerator.device))
        self.space = SearchSpace(self.layers, arguments.search_space, arguments.activation)
        self.table = CostTable(self.layers, self.space.formats)
        self.quantizers = QuantizerSettings(activation_granularity=arguments.activation_granularity)
        self.scores = Scores(
            self.model, self.train, self.accelerator, arguments.batch_size, arguments.prior_images, self.task
        )

    def _data(self, processor: Any) -> tuple[Any, Any]:
        """Both splits, with targets as the model has them."""
        task, config, (image, label) = self.task, self.model.config, self.task.columns
        *splits, names = task.classes(*load_splits(self.arguments.dataset_name), label, processor)
        task.check(config)
        ids = None  # numbers are taken as they are
        if task.class_per_image and getattr(splits[0].features[label], "names", None) is not None:
            ids = match_given(names, names_of(config), config.num_labels, self.arguments.match_labels).ids
        options = {"image_column": image, "label_column": label, "label_ids": ids, "cache": True}
        limits = (self.arguments.max_train_samples, self.arguments.max_eval_samples)
        train, held_out = (
            task.data(at_most(split, limit), processor, config.num_labels, **options)
            for split, limit in zip(splits, limits, strict=True)
        )
        return train, held_out

    def run(self, method: str, bits: float, seed: int) -> dict[str, Any]:
        """One row: choose formats, train in them, evaluate."""
        problem = self.problem(method, bits)
        self.model.load_state_dict(self.original)
        steps = 0 if method.startswith("ptq-") else self.arguments.max_steps
        spent = 0.0
        choose: Callable[[], Allocation]
        name = method.removeprefix("ptq-")
        if name in scores():
            found = self.scores.of(name, problem, seed)
            spent = found.seconds
        elif is_search(name) and (config := search_config(name)).prior != "none":
            spent = self.scores.prior(config, problem, seed).seconds  # kept for `one_shot`, outside its time
        with peak_memory(self.accelerator.device) as peak:
            start = time.perf_counter()
            if name == "differentiable" or name == "gumbel":
                choose = lambda: self.differentiable(name, problem, seed, method)  # noqa: E731
            elif is_search(name):
                choose = lambda: self.one_shot(name, problem, seed)  # noqa: E731
            else:
                if name in scores():
                    allocation = self.space.allocation(problem.choice_at_target(-found.decision_scores))
                else:
                    allocation = self.fixed(name, bits, problem, seed)
                choose = lambda: self.fixed_training(allocation, steps, method, seed)  # noqa: E731
            chosen = choose()
            seconds = time.perf_counter() - start
        score = self.score()
        restore(self.model)
        return {
            "method": method,
            "target_bits": f"{bits:g}",
            "seed": seed,
            "value": round(score.value, 5),
            "loss": round(score.loss, 5),
            "cost_ratio": round(bops(self.layers, chosen) / self.wanted(method, problem), 4),
            "steps": steps,
            "seconds": round(seconds + spent, 1),
            "peak_mb": round((peak.working_bytes or 0) / 1e6) or "",
            "allocation": chosen.summary(),
        }

    def score(self) -> Any:
        """Of the model as it is, on the evaluation images."""
        return evaluate(self.model, self.eval, self.accelerator, task=self.task)

    def problem(self, method: str, bits: float) -> SearchProblem:
        """The formats that a method chooses from, and what they cost. Raises: ConfigError: there are none."""
        target = Target.of(target_bits=bits)
        if method.removeprefix("ptq-") != "random-no-int2":
            return SearchProblem(self.space, self.table, target)
        formats = [fmt for fmt in self.space.formats if fmt.name != "int2"]
        if not formats:
            raise ConfigError(f"{method} needs a format other than int2 in --search_space")
        space = SearchSpace(self.layers, formats, self.space.activation)
        return SearchProblem(space, CostTable(self.layers, space.formats), target)

    def check(self, method: str, bits: float) -> None:
        """Raises: TargetError: the method has no allocation of that cost, out of reach or in a gap of the space."""
        name = method.removeprefix("ptq-")
        if name in UNIFORM or uniform_format(method) is not None:
            return
        problem = self.problem(method, bits)
        try:
            if name in RANDOM:
                random_allocation(problem, seed=0)
            else:
                problem.choice_at_target(torch.zeros(problem.space.allowed.shape))
        except TargetError as error:
            raise TargetError(f"{method}: {error}") from error

    def wanted(self, method: str, problem: SearchProblem) -> float:
        """What the row's target costs. A uniform model may cost what the search space cannot."""
        uniform = method.removeprefix("ptq-") in UNIFORM or uniform_format(method) is not None
        return problem.aim.resolve(self.table, (0.0, self.table.fp32)) if uniform else problem.target_cost

    def fixed(self, name: str, bits: float, problem: SearchProblem, seed: int) -> Allocation:
        """The allocation of a method that needs no training to choose one, or chooses by short trainings."""
        if (fmt := uniform_format(name)) is not None:
            return uniform(self.layers, fmt)
        if name in ("uniform-int", "uniform-fp"):
            return uniform(self.layers, f"int{bits:g}" if name == "uniform-int" else FLOATS[int(bits)])
        if name == "manual":
            return manual(self.layers, f"int{bits:g}")
        if name in RANDOM:
            return random_allocation(problem, seed)
        if name in (own := baselines()):
            return own[name](problem, seed)
        objective = ShortTraining(
            self.model, self.layers, self.train, self.settings(seed, self.trial_steps), self.accelerator,
            settings=self.quantizers, teacher=self.teacher, task=self.task,
        )  # fmt: skip
        sampler: Any = name.removeprefix("multi-trial-")
        journal = self.arguments.output.with_suffix(f".{name}-{bits:g}-{seed}.jsonl")
        found = multi_trial(problem, objective, self.arguments.trials, seed=seed, sampler=sampler, journal=journal)
        journal.unlink()
        return found.allocation

    def fixed_training(self, allocation: Allocation, steps: int, name: str, seed: int) -> Allocation:
        formats = {fmt for pair in allocation.values() for fmt in (pair.weight, pair.activation) if fmt}
        switch = self.searchable(sorted(formats, key=lambda fmt: fmt.name))
        switch.set_allocation(allocation)
        if steps:
            self.trained(self.settings(seed, steps), FixedFormats(switch, allocation), name)
        return allocation

    def one_shot(self, name: str, problem: SearchProblem, seed: int) -> Allocation:
        config = search_config(name)
        steps, device = self.arguments.max_steps, self.accelerator.device
        search = OneShotSearch(problem, config, steps, seed=seed, device=device)
        if config.prior != "none":
            search.start_from(self.scores.prior(config, problem, seed).decision_scores)
            self.model.load_state_dict(self.original)
        switch = self.searchable(self.space.formats)
        self.trained(self.settings(seed, steps, config.quality), SearchHook(search, switch), name)
        allocation = search.finalize().allocation
        switch.set_allocation(allocation)
        return allocation

    def differentiable(self, name: str, problem: SearchProblem, seed: int, label: str) -> Allocation:
        config = DifferentiableConfig()
        if name == "gumbel":
            config = DifferentiableConfig(relaxation="gumbel", temperature_start=5.0, temperature_end=0.5)
        steps = self.arguments.max_steps
        run = lambda hook: self.trained(self.settings(seed, steps), hook, label)  # noqa: E731
        return differentiable_search(self.model, problem, run, steps, config, seed=seed).allocation

    def trained(self, config: TrainConfig, hook: StepHook, name: str) -> torch.nn.Module:
        """`train` for the model and data that are compared, with the teacher if there is one."""
        return train(self.model, self.train, config, self.accelerator, hook=hook, teacher=self.teacher, name=name,
                     task=self.task)  # fmt: skip

    def searchable(self, formats: Any) -> Any:
        groups = {layer.name: layer.input_group for layer in self.table.layers}
        return make_searchable(self.model, formats, names=list(groups), input_groups=groups, settings=self.quantizers)

    def settings(self, seed: int, steps: int, quality: Any = "loss") -> TrainConfig:
        a = self.arguments
        return TrainConfig(
            max_steps=steps,
            batch_size=a.batch_size,
            learning_rate=a.learning_rate,
            distill_weight=a.distill,
            feature_weight=a.distill_features,
            seed=seed,
            quality=quality,
        )


class _CompareParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{' '.join(message.split())}; {self.prog} --help lists the arguments")


def parser(command: str) -> argparse.ArgumentParser:
    text = (__doc__ or "").replace("{command}", command)
    made = _CompareParser(
        command, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("model", help="folder of the fp32 checkpoint that everything starts from")
    made.add_argument("--dataset_name", required=True, help="Hub id, folder, or 'digits'")
    made.add_argument("--task", default=IMAGE_CLASSIFICATION.name, help="what the model does (default: %(default)s)")
    made.add_argument("--match_labels", choices=("name", "index"), default="name",
                      help="match classes of data and model by name, or take the numbers as they are")  # fmt: skip
    made.add_argument("--methods", nargs="+", default=list(METHODS))
    made.add_argument("--target_bits", nargs="+", type=float, default=[3.0])
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--search_space", default="mixed")
    made.add_argument(
        "--activation", choices=("same", "separate"), default="same", help="formats of weights and inputs"
    )
    made.add_argument(
        "--activation_granularity", choices=("per_token", "per_token_clipped"), default="per_token",
        help="scale of a layer's input: of each token, or that times a factor per layer, which training learns",
    )  # fmt: skip
    made.add_argument("--max_steps", type=int, default=400)
    made.add_argument("--batch_size", type=int, default=64)
    made.add_argument("--learning_rate", type=float, default=5e-4)
    made.add_argument(
        "--distill", type=float, default=0.0, help="share of the loss that imitates the fp32 model, 0 to 1"
    )
    made.add_argument("--distill_features", type=float, default=0.0,
                      help="weight of what blocks' outputs miss of the fp32 model's, added to the loss")  # fmt: skip
    made.add_argument("--prior_images", type=int, default=1536, help="of the sensitivity passes")
    made.add_argument("--trials", type=int, default=8, help="of the multi-trial searches")
    made.add_argument("--trial_steps", type=int, help="of one trial; default: a quarter of max_steps")
    made.add_argument("--max_train_samples", type=int, help="so many images of the split, chosen at random")
    made.add_argument("--max_eval_samples", type=int, help="so many images of the split, chosen at random")
    made.add_argument("--use_cpu", action="store_true")
    made.add_argument("--output", type=Path, required=True, help="CSV to add to; table and figure go beside it")
    return made


def main(argv: list[str], command: str = "fliqs-hf compare") -> list[dict[str, Any]]:
    """Parse and run.

    Returns: the summary, a row per target and method.
    Raises: FliqsError: a method, target, model or data set that does not work.
    """
    arguments = parser(command).parse_args(argv)
    check_values(vars(arguments))
    for bits in arguments.target_bits:
        Target.of(target_bits=bits)
    check_match(find_task(arguments.task), arguments.match_labels)
    check_methods(arguments.methods, arguments.activation, arguments.activation_granularity)
    hf_logging.disable_progress_bar()
    check_outputs(arguments)
    with locked(arguments.output, arguments.output.with_name(f".{arguments.output.name}.lock")):
        _add_rows(arguments, f"{command} {shlex.join(argv)}")
        print(write_summary(arguments.output))
    return summarise(arguments.output)[1]


def _add_rows(arguments: argparse.Namespace, command: str) -> None:
    """Run what the CSV does not have yet."""
    settings = {k: v for k, v in vars(arguments).items() if k not in FREE}
    if arguments.task == IMAGE_CLASSIFICATION.name:
        del settings["task"]  # as tables written before have it
    if not arguments.distill_features:
        del settings["distill_features"]  # likewise
    if arguments.max_train_samples is not None or arguments.max_eval_samples is not None:
        settings["samples"] = "random"  # in tables written before they are the first ones
    table = Table(arguments.output, settings)
    todo = [
        (method, bits, seed)
        for method, bits, seed in runs(arguments.methods, arguments.target_bits, arguments.seeds)
        if (method, f"{bits:g}", str(seed)) not in table.done
    ]
    if not todo and not table.done:
        raise ConfigError(f"nothing to compare: {', '.join(arguments.methods)} exist for whole bits from 3 to 8 only")
    if not todo:
        return
    comparison = Comparison(arguments)
    for method, bits in {(method, bits) for method, bits, _ in todo}:
        comparison.check(method, bits)
    notes, key = [command, str(provenance())], ""
    if table.new:
        fp32 = comparison.score()
        key = fp32.key
        notes.append(f"fp32: {key} {fp32.value:.4f}, loss {fp32.loss:.4f}, {fp32.n} images")
    table.begin(notes, key)
    for method, bits, seed in todo:
        table.add(row := comparison.run(method, bits, seed))
        print({key: row[key] for key in COLUMNS[:9]}, flush=True)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Raises: ConfigError: a result would replace a file that is none, or what is compared. DiskError."""
    output = arguments.output
    if not output.name or output.suffix in (".md", ".png"):
        raise ConfigError(f"--output {str(output)!r}: name a CSV file; table (.md) and figure (.png) go beside it")
    check_apart(output, {"model": arguments.model, "--dataset_name": data_source(arguments.dataset_name)})
    check_result_file(output, is_table)
    summary = output.with_suffix(".md")
    check_result_file(summary, is_summary)
    check_result_file(output.with_suffix(".png"), lambda _: summary.exists())  # they are written together
    for journal in output.parent.glob(f"{glob.escape(output.stem)}.multi-trial-*.jsonl"):
        check_result_file(journal, is_journal)


def script(argv: list[str], command: str) -> int:
    """`main` for a terminal. Returns: the exit status: 0, 2 for an error, 128 + number of the signal if stopped."""
    return status_of(lambda: main(argv, command), "the same command goes on")
