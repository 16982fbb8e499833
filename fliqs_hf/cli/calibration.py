"""The calibration images of `fliqs-hf quantize`: for choosing formats, and for rounding well."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.cli.data import load_split
from fliqs_hf.errors import ConfigError
from fliqs_hf.hf import FLIQSConfig
from fliqs_hf.hf import quantize as round_to_nearest
from fliqs_hf.ptq import calibrate
from fliqs_hf.report.validation_data import label_reader
from fliqs_hf.training.images import pixels

#: Images that GPTQ and bias correction see at most: they hold all of them in memory, and more did not help.
ROUNDING_IMAGES = 128


class Calibration:
    """Random images of the calibration split, the same ones at each pass."""

    def __init__(self, args: argparse.Namespace, model: Any, processor: Any) -> None:
        split = load_split(args.calibration, args.calibration_split)
        self._args, self._model, self._processor = args, model, processor
        self._split = split.shuffle(seed=0).select(range(min(args.calibration_images, len(split))))
        self._device = next(model.parameters()).device

    def labelled(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of pixel values and labels, which are the model's own answers where there is no such column."""
        column = self._args.label_column
        if column not in self._split.column_names:
            for images in self._batches("sensitivity (without labels)", len(self._split)):
                with torch.no_grad():
                    labels = self._model(images).logits.argmax(-1)
                yield images, labels
            return
        names = [self._model.config.id2label[i] for i in range(self._model.config.num_labels)]
        read = label_reader(self._split.features[column], names, len(names), "name")
        answers, done = self._split.select_columns(column), 0  # of all columns a slice would decode the images again
        for images in self._batches("sensitivity", len(self._split)):
            values = answers[done : done + len(images)][column]
            labels = torch.tensor([read(value, done + i) for i, value in enumerate(values)], device=self._device)
            done += len(images)
            yield images, labels

    def images(self) -> Iterator[Tensor]:
        """Batches of pixel values of at most `ROUNDING_IMAGES`."""
        return self._batches("calibration", min(ROUNDING_IMAGES, len(self._split)))

    def _batches(self, name: str, count: int) -> Iterator[Tensor]:
        size, column = self._args.batch_size, self._args.image_column
        for first in tqdm(range(0, count, size), desc=name):
            rows = [self._split[i] for i in range(first, min(first + size, count))]
            batch = [pixels(row[column], self._processor, f"image {first + i}") for i, row in enumerate(rows)]
            yield torch.stack(batch).to(self._device)


def check(args: argparse.Namespace) -> None:
    """Raises: ConfigError: an option that needs calibration images, without them."""
    for name, without in (("rounding", "nearest"), ("bias_correction", "false"), ("activations", "dynamic")):
        value = getattr(args, name)
        if value not in (None, without) and not args.calibration:
            raise ConfigError(f"--{name} {value} needs images: give some with --calibration DATASET")


def pack(args: argparse.Namespace, model: Any, allocation: Allocation, calibration: Calibration | None) -> Any:
    """Pack `model` in place, by GPTQ where there are images and nothing else is asked for."""
    if calibration is None:
        return round_to_nearest(model, FLIQSConfig(allocation=allocation, weight_scale=args.weight_scale or "absmax"))
    return calibrate(
        model,
        allocation,
        calibration.images(),
        rounding=args.rounding or "gptq",
        bias_correction=None if args.bias_correction is None else args.bias_correction == "true",
        activations=args.activations or "dynamic",
        weight_scale=args.weight_scale or "mse",
    )
