"""Multi-trial search: propose an allocation at the target cost, score it by training it briefly, again and again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.baselines.allocations import random_scores
from fliqs_hf.checks import is_whole
from fliqs_hf.checksums import sealed, unsealed
from fliqs_hf.errors import CheckpointError, ConfigError, TrainingError
from fliqs_hf.files import append_text, disk_errors, write_text
from fliqs_hf.json_file import parse_json, read_text
from fliqs_hf.optional import needed_for
from fliqs_hf.selection import SearchProblem, SearchSpace
from fliqs_hf.training.seeds import derived_seed

#: (allocation, number of the trial) -> score, higher is better; the same for the same arguments.
Objective = Callable[[Allocation, int], float]
Sampler = Literal["random", "optuna"]


@dataclass(frozen=True)
class Trial:
    """One allocation and how well it did.

    Attributes:
        choice: index into the space's formats for every decision, [D].
        cost: in the unit of the cost table.
        seconds: what the objective took.
    """

    number: int
    choice: tuple[int, ...]
    cost: float
    score: float
    seconds: float


@dataclass(frozen=True)
class MultiTrialResult:
    """The allocation of the best trial (the first of equals), and all trials in order."""

    allocation: Allocation
    best: Trial
    trials: tuple[Trial, ...]


def multi_trial(
    problem: SearchProblem,
    objective: Objective,
    trials: int,
    *,
    seed: int = 0,
    sampler: Sampler = "random",
    journal: str | Path | None = None,
) -> MultiTrialResult:
    """Score `trials` allocations that all meet the target, and keep the best. For one process.

    A proposal is a function of (seed, number of the trial) and, with Optuna, of the trials before: a search that goes
    on from its journal ends in the same result.

    Args:
        sampler: `random`: the best allocation for random scores, as `random_allocation`. `optuna`: a tree-structured
            Parzen estimator suggests a format per decision; the integer program makes the least change, in decisions
            and bits, that meets the target, and the estimator is told the allocation so repaired.
        journal: JSON lines of the trials; those that it has already are not run again. What the objective does is not
            recorded: a changed one needs another journal.
    Raises: ConfigError: bad `trials` or `sampler`. DependencyError: no Optuna. TargetError: no allocation meets the
        target. TrainingError: a score is not finite. DiskError: the journal cannot be written. CheckpointError: the
        journal is damaged, or of a search with other settings.
    Source: Optuna, Akiba et al. 2019; its estimator, Bergstra et al. 2011.
    """
    if not is_whole(trials, 1):
        raise ConfigError(f"trials={trials!r} must be a whole number of at least 1")
    if sampler not in get_args(Sampler):
        raise ConfigError(f"sampler={sampler!r} does not exist; choose from {', '.join(get_args(Sampler))}")
    journal = None if journal is None else Path(journal)
    space = problem.space
    propose = _Random(space, seed) if sampler == "random" else _Optuna(space, seed)
    header = {
        "search": "multi-trial",
        "sampler": sampler,
        "seed": seed,
        "target_cost": problem.target_cost,
        "cap": problem.aim.cap,
        "formats": [fmt.name for fmt in space.formats],
        "decisions": [decision.name for decision in space.decisions],
    }
    done = _read(journal, header, space)[:trials] if journal is not None else []
    with tqdm(total=trials, initial=len(done), desc=f"multi-trial, {sampler}") as bar:
        while len(done) < trials:
            choice = problem.choice_at_target(propose(done))
            start = time.perf_counter()
            score = float(objective(space.allocation(choice), len(done)))
            if not math.isfinite(score):
                raise TrainingError(
                    f"the objective gave {score} for trial {len(done)}: lower its learning rate, or exclude formats "
                    "that ruin the model through the search space"
                )
            cost, seconds = float(problem.cost(choice)), round(time.perf_counter() - start, 3)
            done.append(Trial(len(done), tuple(choice.tolist()), cost, score, seconds))
            if journal is not None:
                _append(journal, header, done[-1])
            bar.update()
            bar.set_postfix(best=f"{max(trial.score for trial in done):.4g}")
    best = max(done, key=lambda trial: trial.score)
    return MultiTrialResult(space.allocation(torch.tensor(best.choice)), best, tuple(done))


class _Random:
    def __init__(self, space: SearchSpace, seed: int) -> None:
        self.space, self.seed = space, seed

    def __call__(self, done: Sequence[Trial]) -> Tensor:
        """Scores [D, K] of the next trial."""
        return random_scores(self.space, derived_seed("multi-trial", self.seed, len(done)))


class _Optuna:
    """Raises: DependencyError: Optuna is not installed."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        with needed_for("sampler='optuna'"):
            import optuna
        self.optuna: Any = optuna
        self.space, self.seed = space, seed
        self.bits = torch.tensor([float(fmt.bits) for fmt in space.formats])
        names = [fmt.name for fmt in space.formats]
        self.distributions = {
            str(row): optuna.distributions.CategoricalDistribution(
                [name for name, ok in zip(names, allowed, strict=True) if ok]
            )
            for row, allowed in enumerate(space.allowed.tolist())
        }

    def __call__(self, done: Sequence[Trial]) -> Tensor:
        """Scores [D, K] of the next trial: 0 for the format suggested, else −1 − the difference in bits.

        A study is made anew from the trials so far, with a seed of its own, so that nothing else decides the outcome.
        """
        names = [fmt.name for fmt in self.space.formats]
        seed = derived_seed("multi-trial", self.seed, len(done)) % 2**32  # NumPy takes 32 bits
        with self._quiet():
            study = self.optuna.create_study(direction="maximize", sampler=self.optuna.samplers.TPESampler(seed=seed))
            for trial in done:
                params = {str(row): names[k] for row, k in enumerate(trial.choice)}
                study.add_trial(
                    self.optuna.trial.create_trial(params=params, distributions=self.distributions, value=trial.score)
                )
            suggested = study.ask(self.distributions).params
        chosen = torch.tensor([names.index(suggested[str(row)]) for row in range(len(self.space.decisions))])
        scores = -1 - (self.bits[None] - self.bits[chosen][:, None]).abs()
        return scores.scatter(1, chosen[:, None], 0.0)

    @contextmanager
    def _quiet(self) -> Any:
        """Without a line in the log for every study and trial."""
        level = self.optuna.logging.get_verbosity()
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        try:
            yield
        finally:
            self.optuna.logging.set_verbosity(level)


def _append(journal: Path, header: dict[str, Any], trial: Trial) -> None:
    with disk_errors(journal):
        journal.parent.mkdir(parents=True, exist_ok=True)
        empty = not journal.exists() or journal.stat().st_size == 0
    lines = [header, asdict(trial)] if empty else [asdict(trial)]
    append_text(journal, "".join(json.dumps(sealed(line)) + "\n" for line in lines))


def _read(journal: Path, header: dict[str, Any], space: SearchSpace) -> list[Trial]:
    """Recorded trials. A last line that was cut off in writing is removed."""
    if not journal.exists():
        return []
    try:
        text = read_text(journal)
        complete = text[: text.rfind("\n") + 1]
        if not is_journal(text) and not json.dumps(sealed(header)).startswith(text):
            raise ValueError("it is no journal of a multi-trial search")
        stored, *entries = [_entry(line) for line in complete.splitlines()] or [header]
        for key, value in header.items():
            if stored.get(key) != value:
                raise CheckpointError(
                    f"the journal {journal} is of a search with {key}={stored.get(key)!r}, this one has {value!r}; "
                    "go on with the same settings, or name another journal"
                )
        if complete != text:
            write_text(journal, complete)
        trials = [Trial(**{**entry, "choice": tuple(entry["choice"])}) for entry in entries]
        for number, trial in enumerate(trials):
            fits = len(trial.choice) == len(space.decisions) and trial.number == number
            if not fits or not all(k >= 0 and space.allowed[row, k] for row, k in enumerate(trial.choice)):
                raise ValueError(f"line {number + 2} is not trial {number} of this search space")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"the journal {journal} cannot be read: {error}; delete it to start again, or name another"
        ) from error
    return trials


def _entry(line: str) -> dict[str, Any]:
    """Raises: ValueError: not what `_append` has written."""
    try:
        return unsealed(parse_json(line, f"the line {line[:60]!r}"))
    except CheckpointError as error:
        raise ValueError(error) from error


def is_journal(head: str) -> bool:
    """Whether a file that begins like this is one, as `_append` writes its header."""
    return head.startswith('{"search": "multi-trial", ')
