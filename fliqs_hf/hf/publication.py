"""What a push publishes of a run folder, and in which form: without the paths of the machine that it was made on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.private import published_json, published_page, without_private
from fliqs_hf.json_file import parse_object, read_text
from fliqs_hf.runs.files import CARD, RECORD, RUN, is_entry, record_text
from fliqs_hf.runs.finished import INDEX, WEIGHTS, FinishedRun

#: Records of a run that are published, beside its figures: no training state, no other model.
PUBLISHED = (
    "settings.json", "results.json", "allocation.json", "layers.json", "search_space.json", "sensitivity.json",
    "alternatives.json",
    "metrics.jsonl", "policy.jsonl", "validation.json", "report.html",
)  # fmt: skip

#: What an earlier push can have left in the repository, and what would contradict the new model if it stayed. Versions
#: before 0.1 had records at the top and in `search`.
OWN_FILES = (
    *(f"{RUN}/{name}" for name in (*PUBLISHED, RECORD, "figures/*.png")),
    "allocation.json", "report.html", "figures/*.png", "search/*.json", "search/*.jsonl",
    WEIGHTS, INDEX, "model-*-of-*.safetensors", "pytorch_model*.bin*",
)  # fmt: skip

#: Of a model, left as they are: what looks like a path in them is a word.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


def publication(run: FinishedRun) -> dict[str, Path | bytes]:
    """Path in the repository, which is that in the run folder -> content; all but the model card.

    Files without a path of this machine in them are left as they are. The record lists what is published, so that a
    download is a run folder like any other.

    Raises: CheckpointError: a record that cannot be read, or a setting of the model that is a path of this machine.
    """
    files: dict[str, Path | bytes] = {file.name: file for file in run.weight_files}
    for file in run.path.iterdir():
        if file.suffix in (".json", ".txt") and file.is_file() and (file.name != INDEX or WEIGHTS not in files):
            if file.name == "config.json":
                files[file.name] = _without_paths(file, _config)
            else:
                files[file.name] = _without_paths(file, published_json) if _is_record(file) else file
    if run.records is not None:
        for name in filter(run.has, PUBLISHED):
            file = run.records / name
            files[f"{RUN}/{name}"] = _without_paths(file, _page(run) if file.suffix == ".html" else published_json)
        files.update({f"{RUN}/figures/{file.name}": file for file in run.figures})
        files[f"{RUN}/{RECORD}"] = record_text(name for name in {*files, CARD} if is_entry(name)).encode()
    return files


def _config(text: str) -> str:
    """Of the model: its settings stay as they were saved, but for the name it was loaded by."""
    for key, value in parse_object(text, "config.json").items():
        if key != "_name_or_path" and without_private(value, key) != value:
            raise CheckpointError(
                f"config.json: the setting {key!r} of the model holds a path of this machine; delete it from the "
                "model's config (`del model.config." + key + "`), save the model again, then publish it"
            )
    return published_json(text)


def _is_record(file: Path) -> bool:
    return file.suffix == ".json" and file.name not in VOCABULARIES


def _page(run: FinishedRun) -> Callable[[str], str]:
    return lambda text: published_page(text, (run.settings.to_dict(), run.results.to_dict()), run.path)


def _without_paths(file: Path, reduce: Callable[[str], str]) -> Path | bytes:
    text = read_text(file)
    try:
        shown = reduce(text)
    except CheckpointError as error:
        raise CheckpointError(f"cannot publish {file}: {error}") from error
    return file if shown == text else shown.encode()
