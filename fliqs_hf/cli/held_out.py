"""Images that decide whether a quantized model is accurate enough: labelled, and none that it was calibrated on."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fliqs_hf.cli.calibration import CalibrationImages
from fliqs_hf.cli.data import TO_VALIDATE, columns
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.training.data import Images
from fliqs_hf.training.evaluation import check_finite
from fliqs_hf.training.images import mode_of, pixels
from fliqs_hf.training.splits import ROW, check_column, load_split, numbered, sample
from fliqs_hf.validation.data import targets

FEWEST = 20
#: Up to so many bytes of images are kept as the model takes them, for every model that is tested: 1000 of 224 pixels.
KEPT_BYTES = 600_000_000


class HeldOutImages:
    """Random labelled images of a split without those of the calibration."""

    def __init__(self, args: argparse.Namespace, model: Any, processor: Any, calibration: CalibrationImages) -> None:
        """Raises: DataError: too few images are left, or they have no labels. ConfigError: splits that overlap."""
        calibration.task.check_right()
        name = args.held_out or args.calibration
        split, parts = load_split(name, args.held_out_split, TO_VALIDATE)
        if name == args.calibration and calibration.overlaps(parts):
            seen, split = calibration.rows, numbered(split)
            if {type(row) for row in seen} != {type(row) for row in split[ROW]}:
                raise ConfigError(
                    "--held_out_split overlaps with the calibration images: name a split, or a part of one, that "
                    "shares none with --calibration_split"
                )
            split = split.select([index for index, row in enumerate(split[ROW]) if row not in seen])
        if len(split) < FEWEST:
            raise DataError(
                f"{len(split)} images are held out, of {FEWEST} at least that a floor needs: name others with "
                "--held_out or --held_out_split, or calibrate on fewer (--calibration_images)"
            )
        rows = sample(split, args.held_out_images)
        named = columns(args)
        check_column(rows, named[1], "label", "the held-out data have")
        self._task = calibration.task
        self._images = Images(rows, named[0])
        self._targets = targets(self._task, rows, named, model.config, processor, args.match_labels)
        self._processor, self._mode, self._size = processor, mode_of(model.config), args.batch_size
        self._kept: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self._targets)

    @torch.no_grad()
    def right(self, model: Any, name: str) -> NDArray[np.bool_]:
        """Which images `model` gets right, bool [images]. Raises: CheckpointError: see `check_finite`."""
        device = next(iter([*model.parameters(), *model.buffers()])).device
        answers = []
        for first in tqdm(range(0, len(self), self._size), desc=name):
            batch = [self._pixels(index) for index in range(first, min(first + self._size, len(self)))]
            prediction = self._task.prediction(model(torch.stack(batch).to(device)))
            check_finite(bool(prediction.isfinite().all()), name)
            answers.append(self._task.answers(prediction).cpu())
        found: NDArray[np.bool_] = self._task.right(torch.cat(answers), self._targets).numpy()
        return found

    def _pixels(self, index: int) -> torch.Tensor:
        if index in self._kept:
            return self._kept[index]
        image, name = self._images[index]
        found = pixels(image, self._processor, name, self._mode)
        if (len(self._kept) + 1) * found.nbytes <= KEPT_BYTES:
            self._kept[index] = found
        return found
