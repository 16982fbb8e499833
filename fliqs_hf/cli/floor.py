"""A floor of accuracy in commands that don't train: which models are tried, on what, and what is said of them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.calibration import CalibrationImages, pack
from fliqs_hf.cli.held_out import HeldOutImages
from fliqs_hf.cli.unused import check_unused
from fliqs_hf.errors import ConfigError
from fliqs_hf.pipeline.floor import Floor, FloorTest, descend
from fliqs_hf.wording import count


def floor_of(args: argparse.Namespace) -> Floor | None:
    """Raises: ConfigError: one without calibration images, or what belongs to one without it."""
    if args.max_drop is None and args.min_accuracy is None:
        of_floor = ("held_out", "held_out_split", "held_out_images", "confidence", "floor_steps")
        check_unused(args, "is for a floor: give --max_drop or --min_accuracy", *of_floor)
        return None
    if not args.calibration:
        raise ConfigError("a floor is met with the help of images: give some with --calibration DATASET")
    return Floor(None if args.max_drop is None else args.max_drop / 100, args.min_accuracy, args.confidence)


def meeting(
    args: argparse.Namespace,
    model: Any,
    allocations: Sequence[Allocation],
    floor: Floor,
    held_out: HeldOutImages,
    calibration: CalibrationImages,
) -> tuple[dict[int, Any], list[FloorTest]]:
    """Pack and test copies of `model`, the most precise first, until one misses the floor.

    Returns: the last three, by their numbers; and what was tested.
    """
    kept: list[Any] = []

    def judge(allocation: Allocation) -> NDArray[np.bool_]:
        packed = pack(args, copy.deepcopy(model), allocation, calibration)
        kept[:] = [*kept[-2:], packed]
        return held_out.right(packed, "held-out images")

    trials = descend(allocations, held_out.right(model, "held-out images, fp32"), judge, floor)
    return dict(enumerate(kept, len(trials) - len(kept))), trials


def taken(trials: Sequence[FloorTest]) -> int | None:
    """The number of the last one that met the floor, None where none did."""
    return max((number for number, trial in enumerate(trials) if trial.met), default=None)


def missed(trials: Sequence[FloorTest], floor: Floor, limited: bool) -> str:
    """Why there is no model, and what to do.

    Args: limited: whether a limit or given formats kept the precision from rising.
    """
    (trial,) = trials
    what = "the only allocation that is allowed" if limited else "the most precise allocation"
    remedy = "raise the limit, " if limited else "add formats of more bits to --search_space, "
    if trial.more_images is not None:
        remedy = f"test on more images (about {count(trial.more_images)} might settle it), {remedy}"
    return (
        f"no model is written: {what} has {trial}, and asked for is {floor}; {remedy}lower the floor, or train "
        "(fliqs-hf search)"
    )


def summary(trials: Sequence[FloorTest], floor: Floor) -> str:
    """Of a floor that was met, as a line of text."""
    taken = [trial for trial in trials if trial.met][-1]
    more = "" if trials[-1].met else f"; the next less precise one has {trials[-1]}"
    return f"held out        {taken}; asked for: {floor}{more}\n"
