"""`fliqs-hf validate`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from fliqs_hf.cli.data import columns, to_validate
from fliqs_hf.cli.output import answer
from fliqs_hf.errors import ConfigError
from fliqs_hf.files import write_text
from fliqs_hf.hf.card import write_card
from fliqs_hf.pipeline.checkpoints import load_model, load_processor, read_config
from fliqs_hf.pipeline.outputs import check_apart, check_result_file, check_writable, data_source
from fliqs_hf.report.run_report import PAGE, WRITTEN, write_report
from fliqs_hf.runs.files import CARD, RUN, RunFiles, is_run, locked_run
from fliqs_hf.training.loading import device_of
from fliqs_hf.training.splits import sample
from fliqs_hf.validation.validate import ValidationResult
from fliqs_hf.validation.validate import validate as compare

FORMS = {
    ".html": ValidationResult.to_html,
    ".md": ValidationResult.to_markdown,
    ".json": ValidationResult.to_json,
}


#: How what is written begins.
OURS = {
    ".html": re.compile("<title>Validation: original against quantized</title>"),
    ".md": re.compile(r"\A# Validation: original against quantized\n"),
    ".json": re.compile(r'\A\{\s*"images": \d+,\s*"confidence": '),
}
#: What is kept in a run folder.
IN_A_RUN = (f"{RUN}/validation.json", f"{RUN}/validation.html")


def validate(args: argparse.Namespace) -> int:
    with locked_run(args.quantized):
        return _validate(args)


def _validate(args: argparse.Namespace) -> int:
    run = RunFiles(Path(args.quantized))
    kept = IN_A_RUN if is_run(run.path) else ()
    outputs = [path for path in map(Path, args.output) if path not in [run.path / name for name in kept]]
    _check_outputs(args, outputs)
    if kept:
        run.check(CARD, *kept, *(WRITTEN if PAGE in run.listed() else ()))
        check_writable(run.path)
    device = device_of(args.device)
    image_column, label_column = columns(args)
    for name in (args.original, args.quantized):
        read_config(name)  # what is wrong with a model shows before the data are fetched
    split, warnings = to_validate(args.quantized, args.dataset_name, args.split)
    if args.max_samples is not None:
        split = sample(split, args.max_samples)
    result = compare(
        load_model(args.original),
        load_model(args.quantized),
        split,
        image_processor=load_processor(args.quantized),
        batch_size=args.batch_size,
        image_column=image_column,
        label_column=label_column,
        match_labels=args.match_labels,
        max_drop=args.max_drop,
        confidence=args.confidence,
        device=device,
        dataset_name=args.dataset_name,
        warnings=warnings,
        task=args.task,
    )
    for path in outputs:
        write_text(path, FORMS[path.suffix](result))
    for name in kept:
        run.write(name, FORMS[Path(name).suffix](result))
    written = [*outputs, *(run.path / name for name in kept)]
    if kept and PAGE in run.listed():
        written.append(write_report(run.path))  # the verdict stands at its top, and in the card
    elif kept:
        written.append(write_card(run.path))
    answer(args.json, result.to_dict(), result.to_markdown() + "".join(f"\nwritten: {path}" for path in written))
    return result.exit_code


def _check_outputs(args: argparse.Namespace, outputs: list[Path]) -> None:
    """Raises: ConfigError: a name that cannot be used. DiskError: a file that cannot be written."""
    models = {"ORIGINAL": args.original, "QUANTIZED": None if is_run(args.quantized) else args.quantized}
    for path in outputs:
        if path.suffix not in FORMS:
            raise ConfigError(f"--output {path}: the ending says the form, one of {', '.join(FORMS)}")
        if not path.parent.is_dir():
            raise ConfigError(f"--output {path}: there is no folder {path.parent}")
        check_apart(path, {**models, "--dataset_name": data_source(args.dataset_name)})
        check_result_file(path, OURS[path.suffix].search)
