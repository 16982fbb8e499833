"""What a push publishes of a run folder, and in which form: without the paths of the machine that it was made on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fliqs_hf.errors import CheckpointError
from fliqs_hf.hf.private import published_json, published_page, without_private
from fliqs_hf.hf.run_folder import INDEX, WEIGHTS, RunFolder

#: Records of a run -> where they are published. What does not exist is left out.
RECORDS = {
    "allocation.json": "allocation.json",
    "report.html": "report.html",
    **{
        name: f"search/{name}"
        for name in (
            "config.json",
            "layers.json",
            "search_space.json",
            "metrics.jsonl",
            "policy.jsonl",
            "sensitivity.json",
            "results.json",
            "validation.json",
        )
    },
}

#: What an earlier push can have left in the repository, and what would contradict the new model if it stayed.
OWN_FILES = (*RECORDS.values(), "figures/*.png", WEIGHTS, INDEX, "model-*-of-*.safetensors", "pytorch_model*.bin*")

#: Of a checkpoint, left as they are: what looks like a path in them is a word.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")


def publication(run: RunFolder) -> dict[str, Path | bytes]:
    """Path in the repository -> content: all of the checkpoint that belongs to it, and the records of the run.

    Files without a path of this machine in them are left as they are.

    Raises: CheckpointError: a record that cannot be read, or a setting of the model that is a path of this machine.
    """
    files: dict[str, Path | bytes] = {file.name: file for file in run.weight_files}
    for file in run.checkpoint.iterdir():
        if file.suffix in (".json", ".txt") and file.is_file() and (file.name != INDEX or WEIGHTS not in files):
            if file.name == "config.json":
                files[file.name] = _without_paths(file, _config)
            else:
                files[file.name] = _without_paths(file, published_json) if _is_record(file) else file
    if run.run is not None:
        for name, target in RECORDS.items():
            if (file := run.run / name).is_file():
                files[target] = _without_paths(file, _page(run) if file.suffix == ".html" else published_json)
        files.update({f"figures/{file.name}": file for file in run.figures})
    return files


def _config(text: str) -> str:
    """Of the model: its settings stay as they were saved, but for the name it was loaded by."""
    data = json.loads(text)
    for key, value in data.items():
        if key != "_name_or_path" and without_private(value, key) != value:
            raise CheckpointError(
                f"config.json: the setting {key!r} of the model holds a path of this machine; delete it from the "
                "model's config (`del model.config." + key + "`), save the model again, then publish it"
            )
    return published_json(text)


def _is_record(file: Path) -> bool:
    return file.suffix == ".json" and file.name not in VOCABULARIES


def _page(run: RunFolder) -> Callable[[str], str]:
    assert run.run is not None
    return lambda text: published_page(text, (run.settings, run.results), run.run or run.checkpoint)


def _without_paths(file: Path, reduce: Callable[[str], str]) -> Path | bytes:
    try:
        text = file.read_text(encoding="utf-8")
        shown = reduce(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    return file if shown == text else shown.encode()
