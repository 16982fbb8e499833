"""`fliqs-hf validate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from fliqs_hf.cli.data import load_split
from fliqs_hf.cli.output import answer
from fliqs_hf.errors import ConfigError
from fliqs_hf.lock import locked_run
from fliqs_hf.pipeline.checkpoints import checkpoint_of, device_of, load_model, load_processor
from fliqs_hf.report.validate import ValidationResult
from fliqs_hf.report.validate import validate as compare

FORMS = {
    ".html": ValidationResult.to_html,
    ".md": ValidationResult.to_markdown,
    ".json": ValidationResult.to_json,
}


def validate(args: argparse.Namespace) -> int:
    with locked_run(args.quantized):
        return _validate(args)


def _validate(args: argparse.Namespace) -> int:
    outputs = [Path(name) for name in args.output]
    for path in outputs:
        if path.suffix not in FORMS:
            raise ConfigError(f"--output {path}: the ending says the form, one of {', '.join(FORMS)}")
        if not path.parent.is_dir():
            raise ConfigError(f"--output {path}: there is no folder {path.parent}")
    split = load_split(args.dataset_name, args.split)
    if args.max_samples is not None:
        if args.max_samples < 2:
            raise ConfigError(f"--max_samples {args.max_samples}: a validation needs at least two images")
        split = split.shuffle(seed=0).select(range(min(args.max_samples, len(split))))
    quantized = checkpoint_of(args.quantized)
    if quantized != args.quantized:
        outputs += [Path(args.quantized) / "validation.json", Path(args.quantized) / "validation.html"]
    result = compare(
        load_model(checkpoint_of(args.original)),
        load_model(quantized),
        split,
        image_processor=load_processor(quantized),
        batch_size=args.batch_size,
        image_column=args.image_column,
        label_column=args.label_column,
        match_labels=args.match_labels,
        max_drop=args.max_drop,
        confidence=args.confidence,
        device=device_of(args.device),
    )
    for path in outputs:
        path.write_text(FORMS[path.suffix](result), encoding="utf-8")
    written = "".join(f"\nwritten: {path}" for path in outputs)
    answer(args.json, result.to_dict(), result.to_markdown() + written)
    return result.exit_code
