"""Digests that bind the weights of a packed checkpoint to its configuration.

`config.json` holds a digest of every tensor in the weight files and of every setting beside them, so that a damaged
file, tensors that changed places, an edited format, or the configuration of one model beside the weights of another
are refused. They stand there, not in the header of the weights: safetensors writes several entries of metadata in
random order, and two saves of one model must give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fliqs_hf.errors import CheckpointError
from fliqs_hf.json_file import parse_json, read_object

#: crc32 finds accidents, at 2.5 GB/s of one core; sha256 (0.4 GB/s, 1.5 where the processor has instructions for it)
#: is for who publishes the configuration's own digest elsewhere.
ALGORITHMS = ("crc32", "sha256")

#: An operator's way to load a checkpoint that has been changed on purpose; `FLIQSConfig(check_integrity=False)` is
#: the program's.
ENVIRONMENT = "FLIQS_CHECK_INTEGRITY"

#: Entries of config.json that change no output: names of classes may be corrected, versions are those of the writer.
#: Transformers drops the last two when it saves.
_FREE = ("id2label", "label2id", "transformers_version", "_name_or_path", "transformers_weights")
_QUANTIZATION = "quantization_config"

#: safetensors' own limit.
MAX_HEADER = 100_000_000

#: As safetensors calls them.
_STORED_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Digests = dict[str, dict[str, str]]
Stamps = dict[str, tuple[int, int, int]]


def digests_of(model: Any, state: Mapping[str, Tensor], algorithm: str) -> Digests:
    """Digests of a packed model that is about to be saved.

    Args:
        state: what the weight files will hold. algorithm: one of `ALGORITHMS`.
    Returns: "settings" (entry of config.json -> digest) and "tensors" (name in the file -> digest).
    Raises: CheckpointError: a tensor that is on no device.
    """
    # What `save_pretrained` is about to write there.
    model.config.dtype = str(model.dtype).split(".")[1]
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    settings = json.loads(model.config.to_json_string(use_diff=True))
    return {
        "settings": {key: _setting_digest(value, algorithm) for key, value in _settings(settings).items()},
        "tensors": {name: _tensor_digest(name, tensor, algorithm) for name, tensor in state.items()},
    }


def integrity_wanted() -> bool:
    """Whether the environment lets digests be compared."""
    return os.environ.get(ENVIRONMENT, "1").strip().lower() not in ("0", "false", "no", "off")


def check_integrity(files: Sequence[str], quantization: Mapping[str, Any], digests: Digests, algorithm: str) -> None:
    """Compare digests with the weight files and with the `config.json` beside them, before anything is loaded.

    Where there is none, the caller has given a configuration; then only its quantization is compared.

    Args:
        quantization: the quantization that is in force, as `FLIQSConfig.to_dict` gives it.
    Raises: CheckpointError: it names the first setting or tensor that is not the one that was saved.
    """
    given = _settings({_QUANTIZATION: quantization})
    _compare_settings({key: value for key, value in digests["settings"].items() if key in given}, given, algorithm)
    beside = Path(files[0]).parent / "config.json"
    if beside.is_file():
        _compare_settings(digests["settings"], _settings(read_object(beside)), algorithm)
    unseen = dict(digests["tensors"])
    for file in files:
        for name, found in _file_digests(file, algorithm):
            saved = unseen.pop(name, None)
            if saved is None:
                raise CheckpointError(f"{file} holds {name!r}, which was not saved with this configuration; {_REMEDY}")
            if found != saved:
                raise CheckpointError(
                    f"{name} in {file} is not what was saved with this configuration ({algorithm} {found}, saved "
                    f"{saved}): damaged, or of another model; {_REMEDY}"
                )
    if unseen:
        raise CheckpointError(f"the weight files lack {next(iter(unseen))!r}; {_REMEDY}")


_REMEDY = (
    "download or save the checkpoint again, and load it after that; if the change is meant, pass "
    f"quantization_config=FLIQSConfig(check_integrity=False) or set {ENVIRONMENT}=0"
)


def stamps(files: Iterable[str]) -> Stamps:
    """What tells a file from one that has taken its place."""
    found = {}
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
        found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def check_stamps(before: Stamps) -> None:
    """Raises: CheckpointError: a file has been replaced since, so what was loaded may not be what was checked."""
    for file, stamp in stamps(before).items():
        if stamp != before[file]:
            raise CheckpointError(f"{file} was replaced while it was loaded; load the model again")


def _compare_settings(saved: Mapping[str, str], settings: Mapping[str, Any], algorithm: str) -> None:
    for key in (*settings, *(key for key in saved if key not in settings)):
        if key not in saved:
            problem = f"has {key}={settings[key]!r:.100}, which was not saved"
        elif key not in settings:
            problem = f"lacks {key}"
        elif _setting_digest(settings[key], algorithm) != saved[key]:
            problem = f"has {key}={settings[key]!r:.100}, which is not what was saved"
        else:
            continue
        raise CheckpointError(f"the checkpoint's config.json {problem}: damaged, or of another model; {_REMEDY}")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a config.json that can change an output; those of the quantization as entries of their own."""
    found = {key: value for key, value in config.items() if key not in (*_FREE, _QUANTIZATION)}
    quantization = config.get(_QUANTIZATION)
    if not isinstance(quantization, Mapping):
        return found | {_QUANTIZATION: quantization}
    return found | {f"{_QUANTIZATION}.{key}": value for key, value in quantization.items() if key != "digests"}


def _setting_digest(value: Any, algorithm: str) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return _digest("json", [len(text)], [text.encode()], algorithm)


def _file_digests(file: str, algorithm: str) -> Iterator[tuple[str, str]]:
    """(name, digest) of each tensor in a safetensors file. Read, not mapped: a file that shrinks meanwhile is an error
    then, not the end of the process."""
    try:
        with open(file, "rb", buffering=0) as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if not 0 < size <= MAX_HEADER:
                raise CheckpointError(f"{file} is not a complete safetensors file; download it again")
            header = parse_json(stream.read(size).decode(), file)
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    stream.seek(8 + size + begin)
                    content = _parts(stream, end - begin)
                    yield name, _digest(entry["dtype"], entry["shape"], content, algorithm)
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file ({error}); download it again") from error


def _parts(stream: RawIOBase, size: int) -> Iterator[memoryview]:
    """The next `size` bytes, in parts that a processor's cache can hold."""
    buffer = memoryview(bytearray(min(size, 2**18)))
    while size:
        count = stream.readinto(buffer[: min(size, len(buffer))])
        if not count:
            raise ValueError("it ends too early")
        yield buffer[:count]
        size -= count


def _tensor_digest(name: str, tensor: Tensor, algorithm: str) -> str:
    if tensor.is_meta:
        raise CheckpointError(f"{name} is offloaded, so it cannot be saved: move the whole model to one device first")
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return _digest(_STORED_TYPES[tensor.dtype], list(tensor.shape), [data.data], algorithm)


def _digest(kind: str, shape: Sequence[int], content: Iterable[bytes | memoryview], algorithm: str) -> str:
    """Of bytes with their type and shape: the same bytes in another shape are another tensor."""
    start = f"{kind} {list(shape)}".encode()
    if algorithm == "sha256":
        digest = hashlib.sha256(start)
        for part in content:
            digest.update(part)
        return digest.hexdigest()
    value = zlib.crc32(start)
    for part in content:
        value = zlib.crc32(part, value)
    return f"{value:08x}"
