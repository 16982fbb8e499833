"""Whether what a report says of other formats holds: intervals and signs from few images against many others.

    python recipes/bench/alternatives.py OUTPUT.json recipes/configs/digits.yaml …

runs a search with these arguments of `recipes/vit.py`. Instead of the best format of the next fewer, of as many and
of the next more bits, every format of these is measured, and on all held-out images. Then, many times over, as many
images as a search would take are drawn at random: their intervals and signs are compared with the means of the other
images, which have a standard error of their own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.pipeline import alternatives, search
from fliqs_hf.pipeline.alternatives import differences
from fliqs_hf.runs.folder import versions
from fliqs_hf.selection import SearchSpace
from fliqs_hf.selection.changes import changes

DRAWS, CONFIDENCE = 200, 0.95


def rows_of(space: SearchSpace, choice: list[int]) -> list[tuple[int, int]]:
    """Every format with the next fewer, as many or the next more bits than a decision has."""
    found = []
    for index, (chosen, allowed) in enumerate(zip(choice, space.allowed.tolist(), strict=True)):
        bits = [fmt.bits if ok else None for fmt, ok in zip(space.formats, allowed, strict=True)]
        now = space.formats[chosen].bits
        fewer = max((b for b in bits if b is not None and b < now), default=None)
        more = min((b for b in bits if b is not None and b > now), default=None)
        found += [(index, k) for k, b in enumerate(bits) if b is not None and b in (fewer, now, more) and k != chosen]
    return found


def study(found: Tensor, ways: Sequence[str], images: int) -> dict[str, dict[str, float | None]]:
    """Of each way and of all: how often the interval covers what the other images show, and the sign is theirs.

    Args: found: differences [rows, N]. images: to measure on, fewer than N.
    """
    generator, drawn = torch.Generator().manual_seed(0), []
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, images - 1))
    for _ in range(DRAWS):
        order = torch.randperm(found.shape[1], generator=generator)
        others = found[:, order[images:]]
        truth, error = others.mean(1), others.std(1) / others.shape[1] ** 0.5
        made = changes(found[:, order[:images]], ways, CONFIDENCE)
        value = torch.tensor([change.value for change in made], dtype=torch.float64)
        own = torch.tensor([change.high - change.value for change in made], dtype=torch.float64) / quantile
        drawn.append({
            "covered": (value - truth).abs() <= quantile * (own.square() + error.square()).sqrt(),
            "known": torch.tensor([change.known for change in made]),
            "beyond": value.abs() > 2 * own,
            "clear": truth.abs() > 2 * error,
            "right": (value > 0) == (truth > 0),
        })  # fmt: skip
    every = {name: torch.stack([one[name] for one in drawn]) for name in drawn[0]}
    result = {}
    for way in (*sorted(set(ways)), "all"):
        rows = torch.tensor([way in (one, "all") for one in ways])
        covered, known, beyond, clear, right = (every[name][:, rows] for name in every)
        result[way] = {
            "alternatives": int(rows.sum()),
            "coverage": _share(covered),
            "sign known": _share(known),
            "of these right, where the others are clear": _share(right[known & clear]),
            "beyond two standard errors": _share(beyond),
            "of those right, where the others are clear": _share(right[beyond & clear]),
        }
    return result


def _share(which: Tensor) -> float | None:
    return round(float(which.double().mean()), 4) if which.numel() else None


def main(argv: list[str]) -> int:
    output, made = Path(argv[0]), {}

    def measure(
        job: Any, model: nn.Module, layers: Mapping[str, nn.Module], space: SearchSpace, allocation: Any, signals: Any
    ) -> None:
        """In the place of `measure_alternatives`."""
        choice = space.choice(allocation)
        rows, every = rows_of(space, choice.tolist()), len(job.eval_data)
        usual = alternatives.images_for(job, space, len(alternatives.next_formats(space, choice.tolist(), signals)))
        images = min(usual, every // 2)
        with torch.no_grad(), evaluation(model):
            losses = alternatives.losses_of(job, model, every)
            start = time.perf_counter()
            found = differences(model, layers, space, choice, rows, job.quantizers, losses)
        seconds = time.perf_counter() - start
        bits = [fmt.bits for fmt in space.formats]
        more = [bits[k] - bits[int(choice[index])] for index, k in rows]
        ways = ["down" if one < 0 else "up" if one > 0 else "same" for one in more]
        made.update(
            held_out_images=every, images=images, usual_images=usual, seconds_per_pass=seconds / len(rows) / every
        )
        made.update(draws=DRAWS, confidence=CONFIDENCE, result=study(found, ways, images))

    search.measure_alternatives = measure
    results = search.main(argv[1:])
    made |= {"arguments": argv[1:], "accuracy": results[0]["accuracy"], "versions": versions()}
    output.write_text(json.dumps(made, indent=2, default=str) + "\n")
    print(json.dumps(made["result"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
