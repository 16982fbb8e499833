"""The calibration images of `fliqs-hf quantize`: for choosing formats, and for rounding well."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.data import NO_LABELS, TO_CALIBRATE, check_meant, columns
from fliqs_hf.cli.targets import zero_points
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format, parse
from fliqs_hf.formats.spaces import with_zero_point
from fliqs_hf.hf import FLIQSConfig, fold_batchnorm
from fliqs_hf.hf import quantize as round_to_nearest
from fliqs_hf.nn import QuantizerSettings
from fliqs_hf.ptq import calibrate, rotate
from fliqs_hf.ptq.memory import fitting_images
from fliqs_hf.tasks import find_task
from fliqs_hf.training.data import Images
from fliqs_hf.training.images import mode_of, pixels
from fliqs_hf.training.splits import ROW, Part, check_column, common, load_split, sample
from fliqs_hf.validation.data import targets

#: Images that GPTQ and bias correction see at most. They go through the model at once.
ROUNDING_IMAGES = 512
FEW = 4


class CalibrationImages:
    """Random images of the calibration split, the same ones at each pass."""

    def __init__(self, args: argparse.Namespace, model: Any, processor: Any) -> None:
        """Raises: DataError: the images cannot be loaded; the first one is read."""
        self._args, self._model, self._processor = args, model, processor
        self.task = find_task(args.task)
        self._mode = mode_of(model.config)
        split, parts = load_split(args.calibration, args.calibration_split, TO_CALIBRATE)
        self._parts = parts
        self.split = "+".join(f"{name}[{first}:{last}]" for name, first, last in parts)
        self._rows = sample(split, args.calibration_images)
        self._columns = columns(args)
        self._images = Images(self._rows, self._columns[0])
        self._labels = self._has_labels()
        self._device = next(model.parameters()).device
        self._own_answers: list[Tensor] = []
        self._pixels(0)

    @property
    def rows(self) -> set[int | str]:
        """Which of the split, see `training.splits.ROW`."""
        return set(self._rows[ROW])

    def overlaps(self, parts: Sequence[Part]) -> bool:
        """Whether the split that these were drawn from shares images with parts of the same data set."""
        return common(self._parts, parts) > 0

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of pixel values and labels, which are the model's own answers where there are no labels.

        Raises: ConfigError: the model chooses no class. DataError: a label that is none of its classes; before any
            image is read.
        """
        config = self._model.config
        self.task.check(config)
        if not self._labels:
            for number, images in enumerate(self._batches("sensitivity (without labels)", len(self._images))):
                if number == len(self._own_answers):  # of the fp32 model, which a second pass finds quantized
                    with torch.no_grad():
                        self._own_answers.append(self.task.answers(self.task.prediction(self._model(images))))
                yield images, self._own_answers[number]
            return
        answers = targets(self.task, self._rows, self._columns, config, self._processor, self._args.match_labels)
        done = 0
        for images in self._batches("sensitivity", len(self._images)):
            yield images, answers[done : done + len(images)].to(self._device)
            done += len(images)

    def few(self) -> Tensor:
        """Pixel values of `FEW` of them, to see how the model is built."""
        return torch.stack([self._pixels(index) for index in range(min(FEW, len(self._images)))]).to(self._device)

    def images(self) -> Iterator[Tensor]:
        """Batches of pixel values, of at most `ROUNDING_IMAGES` and of what fits into memory."""
        wanted = min(ROUNDING_IMAGES, len(self._images))
        count = min(wanted, fitting_images(self._model))
        if count < wanted:
            print(f"rounding with {count} images instead of {wanted}: more would not fit into memory", file=sys.stderr)
        return self._batches("calibration", count)

    def _has_labels(self) -> bool:
        """Raises: DataError: the column that was named does not exist. Where a floor's held-out images are another
        data set, which must have it, it may be theirs alone: then that is said."""
        given, there = self._args.label_column, self._columns[1] in self._rows.column_names
        if there or given in (None, NO_LABELS):
            return there
        if self._args.held_out in (None, self._args.calibration):
            check_column(self._rows, given, "label", "the calibration data have")
        print(f"the calibration data have no column {given!r}: the model's own answers serve", file=sys.stderr)
        return False

    def _batches(self, name: str, count: int) -> Iterator[Tensor]:
        size = self._args.batch_size
        for first in tqdm(range(0, count, size), desc=name):
            batch = [self._pixels(index) for index in range(first, min(first + size, count))]
            yield torch.stack(batch).to(self._device)

    def _pixels(self, index: int) -> Tensor:
        image, name = self._images[index]
        return pixels(image, self._processor, name, self._mode)


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError: an option that needs calibration images, without them."""
    of_images = (
        "calibration_split",
        "calibration_images",
        "image_column",
        "label_column",
        "match_labels",
        "batch_size",
    )
    check_meant(args, "calibration", *of_images)
    columns(args)  # refuses what does not fit the task
    options = {"rounding": "nearest", "bias_correction": "false", "activations": "dynamic", "rotation": "false"}
    for name, without in {**options, "zero_points": "false"}.items():
        value = getattr(args, name)
        if value not in (None, without) and not args.calibration:
            raise ConfigError(f"--{name} {value} needs images: give some with --calibration DATASET")
    if args.weight_scale == "output" and (not args.calibration or args.rounding == "nearest"):
        raise ConfigError("--weight_scale output is found by GPTQ: give --calibration DATASET and --rounding gptq")


def turn(args: argparse.Namespace, model: Any, calibration: CalibrationImages | None, chosen: bool) -> None:
    """Rotate `model` in place, where there are images and nothing else is asked for; say what is not rotated, and let
    the settings say whether something was. Where all inputs have 8 bits or more it gains nothing (docs/ptq.md).

    Args: chosen: formats differ from layer to layer.
    """
    wide = not chosen and (args.activation_format in (None, "none") or parse(args.activation_format).bits >= 8)
    if calibration is None or args.rotation == "false" or (args.rotation is None and wide):
        return
    reasons = rotate(model, calibration.few())
    for part, reason in reasons.items():
        if reason:
            print(f"the {part} is not rotated: {reason}", file=sys.stderr)
    args.rotation = "false" if all(reasons.values()) else "true"


def input_format(args: argparse.Namespace) -> Format | None:
    """The one of all inputs."""
    if args.activation_format == "none":
        return None
    fmt = parse(args.activation_format)
    return with_zero_point(fmt) if zero_points(args) else fmt


def rounded(args: argparse.Namespace) -> dict[str, Any]:
    """How `pack` will quantize where there are images, as arguments of `allocate`."""
    settings = QuantizerSettings(weight_scale="absmax" if args.weight_scale == "absmax" else "mse")
    return {"rounding": args.rounding or "gptq", "settings": settings}


def pack(args: argparse.Namespace, model: Any, allocation: Allocation, calibration: CalibrationImages | None) -> Any:
    """Pack `model` in place, as it is delivered: by GPTQ where there are images and nothing else is asked for."""
    if calibration is None:
        weight_scale = args.weight_scale or "absmax"
        packed = round_to_nearest(model, FLIQSConfig(allocation=allocation, weight_scale=weight_scale))
    else:
        packed = calibrate(
            model,
            allocation,
            calibration.images(),
            rounding=args.rounding or "gptq",
            bias_correction=None if args.bias_correction is None else args.bias_correction == "true",
            activations=args.activations or "dynamic",
            weight_scale=args.weight_scale or "mse",
        )
    if args.fold_batchnorm == "true":
        try:
            fold_batchnorm(packed)
        except ConfigError as error:  # the model cannot be run
            print(f"batch norms stay: {error}", file=sys.stderr)
    return packed
