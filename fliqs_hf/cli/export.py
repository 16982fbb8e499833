"""`fliqs-hf export`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fliqs_hf.cli.data import check_meant, columns, to_validate
from fliqs_hf.cli.output import answer, table
from fliqs_hf.cli.unused import check_unused
from fliqs_hf.errors import ConfigError
from fliqs_hf.hf.export.configs.counterpart import Counterpart
from fliqs_hf.hf.export.forms import LayerForm
from fliqs_hf.hf.export.targets import TARGETS, Settings, find_target
from fliqs_hf.pipeline.checkpoints import load_processor, read_config
from fliqs_hf.pipeline.export import ExportResult
from fliqs_hf.pipeline.export import export as export_model
from fliqs_hf.pipeline.export_config import LIBRARIES, export_config
from fliqs_hf.training.data import Images
from fliqs_hf.training.images import mode_of, pixels
from fliqs_hf.training.splits import sample


def export(args: argparse.Namespace) -> int:
    if args.to in LIBRARIES:
        return _export_config(args)
    check_meant(args, "dataset_name", "split", "image_column", "max_samples", "batch_size")
    result = export_model(
        args.run,
        args.output,
        to=args.to,
        images=None if args.dataset_name is None else _Pixels(args),
        settings=_settings(args),
        min_agreement=args.min_agreement,
        include_preprocessing=args.include_preprocessing,
        overwrite=args.overwrite,
        task=args.task,
    )
    answer(args.json, result.to_dict(), _text(result))
    return 0


def _export_config(args: argparse.Namespace) -> int:
    """Raises: ConfigError: an option that is of models alone."""
    of_files = [field.name for target in TARGETS.values() if target.settings for field in fields(target.settings)]
    of_images = ("dataset_name", "split", "image_column", "max_samples", "batch_size", "task", "min_agreement")
    why = f"is no setting of --to {args.to}, which writes no model: leave it out"
    check_unused(args, why, *of_files, *of_images, "include_preprocessing")
    result = export_config(args.run, args.output, to=args.to, overwrite=args.overwrite)
    kinds = Counter((layer.weight, layer.activation, layer.became) for layer in result.layers)
    rows = [(*kind, count) for kind, count in kinds.most_common()]
    text = table(("weights", "inputs", f"in {args.to}", "layers"), rows) + _changes(result.layers)
    answer(args.json, result.to_dict(), f"{text}\n\nwritten         {result.folder}: {', '.join(result.files)}")
    return 0


def _settings(args: argparse.Namespace) -> Settings | None:
    """Those of the file, where some are given. Raises: ConfigError: one that its target has not."""
    own = find_target(args.to).settings
    given: dict[str, Any] = {}
    for target in TARGETS.values():
        for field in fields(target.settings) if target.settings else ():
            if (value := getattr(args, field.name)) is not None:
                if target.settings is not own:
                    raise ConfigError(f"--{field.name} is no setting of --to {args.to}: leave it out")
                given[field.name] = value
    return own(**given) if own is not None and given else None


class _Pixels:
    """Batches of pixel values of the images that are named; loaded when they are first wanted."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args

    def __iter__(self) -> Iterator[Tensor]:
        args = self._args
        processor, mode = load_processor(args.run), mode_of(read_config(args.run)[0])
        split, _ = to_validate(args.run, args.dataset_name, args.split)
        images = Images(sample(split, args.max_samples), columns(args)[0])
        for first in range(0, len(images), args.batch_size):
            rows = [images[index] for index in range(first, min(first + args.batch_size, len(images)))]
            yield torch.stack([pixels(image, processor, name, mode) for image, name in rows])


def _text(result: ExportResult) -> str:
    agreement = result.agreement
    kinds = Counter((layer.weight, layer.activation, layer.form, layer.stored.lower()) for layer in result.layers)
    text = table(
        ("weights", "inputs", "product", "stored as", "layers"),
        [(*kind, count) for kind, count in kinds.most_common()],
    )
    text += _changes(result.layers)
    noise = " (generated noise: give --dataset_name to know)" if result.images == "generated" else ""
    return (
        f"{text}\n\n"
        f"same class      {agreement.percent:.2f} % of {agreement.images:,} images{noise}{_asked(result)}\n"
        f"logits          differ by {agreement.rms:.3g} (RMS) of {agreement.logits_rms:.3g}\n"
        f"size            {result.file_bytes / 1e6:.3f} MB, all of it; the quantized layers took "
        f"{result.packed_bytes / 1e6:.3f} MB packed\n"
        f"written         {result.folder}: {', '.join(result.files)}"
    )


def _asked(result: ExportResult) -> str:
    """What the percentage was held against."""
    if result.min_agreement is None:
        return ""
    agreement, floor = result.agreement, ""
    if agreement.itself is not None:
        share = 100 * agreement.itself / agreement.images
        floor = f"; with pixels moved by a millionth the packed model agrees with itself in {share:.2f} %"
    return f" (at least {result.min_agreement:.4g} asked for{floor})"


def _changes(layers: Iterable[LayerForm | Counterpart]) -> str:
    """A line for each reason."""
    changes: dict[str, list[str]] = {}
    for layer in layers:
        if layer.changed:
            changes.setdefault(layer.changed, []).append(layer.name)
    return "".join(f"\n{_names(names)}: {reason}" for reason, names in changes.items())


def _names(names: list[Any]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
