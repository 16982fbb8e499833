"""The images that a quantized model is validated on, and what of them it has seen already."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fliqs_hf.cli.unused import check_unused
from fliqs_hf.errors import CheckpointError, DataError
from fliqs_hf.json_file import read_object
from fliqs_hf.records import RunSettings
from fliqs_hf.runs.files import RUN
from fliqs_hf.tasks import find_task
from fliqs_hf.training.splits import ROW, Part, common, load_all, load_split, load_splits, numbered, parts_of, sample
from fliqs_hf.validation.data import check_match

#: Which split is meant, where there are several and none is named.
TO_VALIDATE, TO_CALIBRATE = ("validation", "test"), ("train",)
#: As a label column: labels that the data set has are not used.
NO_LABELS = "none"


def columns(args: argparse.Namespace) -> tuple[str, str]:
    """Of images and of targets, as a command was given them; those that it was not given are the task's.

    Raises: ConfigError: there is no such task, or it has no classes to match.
    """
    task = find_task(args.task)
    check_match(task, getattr(args, "match_labels", "name"))
    image, target = task.columns
    return args.image_column or image, getattr(args, "label_column", None) or target


def check_meant(args: argparse.Namespace, source: str, *names: str) -> None:
    """
    Args:
        names: arguments about the images that the argument `source` names.
    Raises: ConfigError: one of them is given, and there are no such images.
    """
    if not getattr(args, source):
        check_unused(args, f"is about images: give them with --{source} DATASET, or leave it out", *names)


def to_validate(run: str, name: str, split: str | None) -> tuple[Any, list[str]]:
    """The images of a validation, as a `datasets.Dataset`, and what is to be said with its result.

    Images that the model was calibrated or trained on are left out where no split is named and enough others remain;
    else it is said that they are there.

    Args:
        run: the quantized model: a run folder, or any other name.
        name: Hub id, folder (parquet files, or images in one sub-folder per class), or "digits".
        split: or a part of it, such as "test[:500]"; default: "validation" or "test" where there is one, else the only
            one.
    Raises: DataError: it cannot be loaded, or has no such split; it names those that there are.
    """
    images, parts = load_split(name, split, TO_VALIDATE)
    record = _record(Path(run))
    if not any(_same(record.get(key), name) for key in ("dataset_name", "train_dir")):
        return images, []
    searched = "train_val_split" in record
    seen = "train" if searched else record.get("calibration_split") or "train"
    try:
        splits = load_all(name, record.get("dataset_config_name"))
        used = parts_of(splits, seen)
    except DataError:
        return images, []  # the data set has changed since
    shared = common(used, parts)
    if not shared:
        return images, []
    if split is None and (rest := _unseen(record, name, images, seen, searched)) is not None:
        word = "trained and searched with" if searched else "calibrated on"
        return rest, [
            f"{len(images) - len(rest):,} of {len(images):,} images, which the model was {word}, are left out"
        ]
    known = Path(name).resolve().name if Path(name).exists() else name  # a page to pass on shows no private paths
    word, some = ("trained and searched", "most") if searched else ("calibrated", _some(record, used))
    return images, [
        f"{shared:,} of the {len(images):,} images are of {seen!r} of {known!r}, {some} of which the model was {word} "
        "on: it may do better on them than on others. Validate on images that it has not seen (--split)"
    ]


def _unseen(record: dict[str, Any], name: str, images: Any, seen: str, searched: bool) -> Any:
    """Those of the only split that were held out, None where these are too few or not known."""
    if searched:
        if record.get("dataset_name") is None or record.get("validation_split") is not None:
            return None
        share, seed = record["train_val_split"], record.get("seed", 0)
        return load_splits(name, train_val_split=share, seed=seed)[1]
    rows = set(sample(load_split(name, seen)[0], record["calibration_images"])[ROW])
    rest = [row for row in range(len(images)) if row not in rows]
    return numbered(images).select(rest) if len(rest) >= len(rows) else None


def _some(record: dict[str, Any], used: list[Part]) -> str:
    return f"{min(record['calibration_images'], sum(last - first for _, first, last in used)):,}"


def _record(run: Path) -> dict[str, Any]:
    """What a run was told, empty where `run` is none. Earlier versions had it beside the model's folder."""
    for file in (run / RUN / RunSettings.name, run.parent / "config.json"):
        try:
            found = RunSettings.of(read_object(file), file).arguments
        except CheckpointError:
            continue
        if "train_val_split" in found or isinstance(found.get("calibration_images"), int):
            return found
    return {}


def _same(one: Any, other: str) -> bool:
    """Whether two names are of one data set."""
    if not isinstance(one, str):
        return False
    if Path(one).exists() and Path(other).exists():
        return Path(one).resolve() == Path(other).resolve()
    return one == other
