"""What a packed checkpoint must hold, and refusing one that does not, before any of it is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fliqs_hf.errors import CheckpointError, nearest
from fliqs_hf.nn import packed_layers

_FLOATS = {"F32", "F16", "BF16", "F64"}


def file_names(model: Any) -> dict[str, str]:
    """Tensor name in memory -> name in the file: a packed layer's codes are stored as its `weight`."""
    packed = {f"{name}.weight_codes": f"{name}.weight" for name in packed_layers(model)}
    return {name: packed.get(name, name) for name in model.state_dict()}


def saved_state(model: Any) -> dict[str, torch.Tensor]:
    """Name in the file -> tensor, of all that `save_pretrained` writes of a packed model."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict  # heavy, and there is a model already

    names = file_names(model)
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {names[key]: tensor for key, tensor in model.state_dict().items() if key not in ignored}
    saved: dict[str, torch.Tensor] = remove_tied_weights_from_state_dict(state, model)
    return saved


def check_packed_files(model: Any, files: Sequence[str] | None) -> None:
    """Compare the headers of a checkpoint with what the (still empty) packed `model` needs.

    Raises: CheckpointError: a file that is not readable safetensors (truncated, pickled), or a tensor that is
        missing, renamed, wrongly shaped, of the wrong type, or not of this model. The message names it.
    """
    headers: dict[str, tuple[list[int], str]] = {}
    for file in files or ():
        headers.update(read_header(file))
    prefix = model.base_model_prefix + "."
    ignored = [*(model._keys_to_ignore_on_load_missing or ()), *(model._keys_to_ignore_on_save or ())]
    tied = set(model.all_tied_weights_keys)
    used = set()
    names = file_names(model)
    for key, tensor in model.state_dict().items():
        name = names[key]
        known = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in headers]
        if not known:
            if key in tied or any(re.search(pattern, key) for pattern in ignored) or _only_here(key, headers, model):
                continue
            close = nearest(name, (n for n in headers if n not in names.values()))
            raise CheckpointError(
                f"the checkpoint lacks {name!r}"
                + (f" (it has {close!r}, which this model has no place for)" if close else "")
                + "; download it again, or save it again from the model it was made from"
            )
        used.add(known[0])
        _check_tensor(known[0], tensor, *headers[known[0]])
    surplus = [n for n in headers if n not in used and not _only_here(n, names.values(), model)]
    if surplus:
        raise CheckpointError(f"the checkpoint holds {surplus[0]!r}, which {type(model).__name__} has no place for")


def check_places(files: Sequence[str], source: str) -> None:
    """Raises: CheckpointError: the index of a checkpoint names a file that is not in the folder of the checkpoint.

    Args: source: what was given to `from_pretrained`.
    """
    for file in files:
        path = Path(file)
        inside = not Path(source).is_dir() or path.is_relative_to(source)
        if not inside or ".." in path.relative_to(source if Path(source).is_dir() else path.anchor).parts:
            raise CheckpointError(f"the checkpoint's index names {file!r:.200}, which is not in its folder")


def plain_name(file: str) -> bool:
    """Whether `file` names a safetensors file of a folder, not one somewhere else."""
    return file.endswith(".safetensors") and not set(file) & set("/\\\0") and not file.startswith(".")


def read_header(file: str) -> dict[str, tuple[list[int], str]]:
    """Tensor name -> (shape, type such as "U8") of a safetensors file.

    Raises: CheckpointError: no safetensors file, or not a complete one.
    """
    if not str(file).endswith(".safetensors"):
        raise CheckpointError(f"{file}: packed checkpoints are safetensors files; nothing else is read")
    if not Path(file).is_file():  # a pipe or a device would never end
        raise CheckpointError(f"{file} is no regular file; download it again")
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            return {name: (list(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); download it again") from error


def _check_tensor(name: str, expected: torch.Tensor, shape: list[int], dtype: str) -> None:
    if shape != list(expected.shape):
        raise CheckpointError(
            f"{name}: the checkpoint has shape {tuple(shape)}, the configured formats need {tuple(expected.shape)}"
        )
    wanted = (
        {"U8"}
        if expected.dtype == torch.uint8
        else {"F32"}
        if name.endswith((".weight_scale", ".input_scale"))
        else _FLOATS
    )
    if (expected.is_floating_point() or expected.dtype == torch.uint8) and dtype not in wanted:
        raise CheckpointError(f"{name}: the checkpoint has type {dtype}, expected {' or '.join(sorted(wanted))}")


def _only_here(name: str, names: Iterable[str], model: Any) -> bool:
    """Whether `name` is of a part (head, pooler) that none of `names` is of, between models of different classes.

    Transformers initialises parts that a checkpoint of another class does not have, and drops those that the model
    does not have, and says so; a part that both have must be complete.
    """
    if type(model).__name__ in (model.config.architectures or ()):
        return False
    part = part_of(name, model)
    return all(part_of(other, model) != part for other in names)


def part_of(name: str, model: Any) -> str:
    """The child of the base model, or of the model with a head, that `name` is in."""
    return name.removeprefix(model.base_model_prefix + ".").partition(".")[0]
