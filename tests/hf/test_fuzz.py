"""Random damage to a packed checkpoint is refused, or changes no logit. Many more rounds, with another seed:
`python -m tests.hf.test_fuzz 2000 7`."""

from __future__ import annotations

import copy
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load, save
from transformers import AutoModelForImageClassification

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.errors import FliqsError
from tests.helpers.models import images, tiny

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
ROUNDS = 320
DAMAGED = ("whole", "shards")

Mutation = Callable[[random.Random, Path], object]


def flip(random: random.Random, file: Path, low: int = 0, high: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[random.randrange(low, min(high or len(data), len(data)))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def header_size(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def weights(folder: Path) -> Path:
    return folder / WEIGHTS if (folder / WEIGHTS).exists() else min(folder.glob("model-*.safetensors"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = weights(folder)
    tensors = load(file.read_bytes())
    edit(tensors)
    file.write_bytes(save(tensors, {"format": "pt"}))


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def swap_tensors(random: random.Random, folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        first = random.choice(list(tensors))
        alike = [n for n, t in tensors.items() if t.shape == tensors[first].shape and t.dtype == tensors[first].dtype]
        second = random.choice(alike)
        tensors[first], tensors[second] = tensors[second], tensors[first]

    edit_tensors(folder, edit)


def swap_scales(random: random.Random, folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[random.choice([name for name in tensors if name.endswith("weight_scale")])]
        i, j = random.sample(range(len(scale)), 2)
        scale[[i, j]] = scale[[j, i]]

    edit_tensors(folder, edit)


def not_finite(random: random.Random, folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[random.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])]
        tensor.view(-1)[random.randrange(tensor.numel())] = random.choice([float("nan"), float("inf")])

    edit_tensors(folder, edit)


def rename(random: random.Random, folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = random.choice(list(tensors))
        tensors[name + random.choice(["", "2", ".bias"])] = tensors.pop(name)

    edit_tensors(folder, edit)


def relabel(random: random.Random, folder: Path) -> None:
    """Another type or shape of the same bytes, in the header."""
    file = weights(folder)
    data, size = file.read_bytes(), header_size(file)
    old, new = random.choice(
        [(b'"F32"', b'"I32"'), (b'"U8"', b'"I8"'), (b"[32]", b"[16,2]"), (b"[48,32]", b"[32,48]")]
    )
    places = [i for i in range(size) if data.startswith(old, i, size)]
    if places:
        at = random.choice(places)
        header = data[8:at] + new + data[at + len(old) : size]
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[size:])


def truncate(random: random.Random, folder: Path) -> None:
    file = weights(folder)
    data = file.read_bytes()
    file.write_bytes(data[: random.randrange(len(data))])


def append(random: random.Random, folder: Path) -> None:
    with weights(folder).open("ab") as stream:
        stream.write(random.randbytes(random.randrange(1, 64)))


def zeros(random: random.Random, folder: Path) -> None:
    """A sector that was never written."""
    file = weights(folder)
    data = bytearray(file.read_bytes())
    start = random.randrange(len(data)) // 512 * 512
    data[start : start + 512] = bytes(len(data[start : start + 512]))
    file.write_bytes(data)


def other_format(random: random.Random, folder: Path) -> None:
    alike = [["int4", "e2m1"], ["int8", "e4m3", "e5m2", "e3m4"], ["int6", "e3m2", "e2m3"], ["int3", "e2m0"]]

    def edit(config: dict[str, Any]) -> None:
        entry = random.choice(list(config["quantization_config"]["allocation"].values()))
        role = random.choice(["weight", "activation"])
        entry[role] = random.choice(next((formats for formats in alike if entry[role] in formats), alike[1]))

    edit_json(folder / CONFIG, edit)


def edit_setting(random: random.Random, folder: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        data = random.choice([config, config, config["quantization_config"]])
        key = random.choice([key for key in data if key not in ("allocation", "quantization_config")])
        match random.randrange(4):
            case 0:
                del data[key]
            case 1:
                data[key + "s"] = data.pop(key)
            case 2:
                data[random.choice(["hidden_act", "surplus", "image_size", "dtype"])] = random.choice(["relu", 64, {}])
            case _:
                data[key] = changed(random, data[key])

    edit_json(folder / CONFIG, edit)


def changed(random: random.Random, value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return random.choice([value * 2, value + 1, value / 2, 0, -value, None, str(value)])
        case str():
            return random.choice(["relu", "gelu", "per_tensor", "float16", value.upper(), 5, None])
        case _:
            return random.choice([None, [], {}, 5, "x"])


def lose_digests(random: random.Random, folder: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        del config["quantization_config"]["digests"]
        config["quantization_config"]["format_version"] = random.choice([1, 2, True, "2"])

    edit_json(folder / CONFIG, edit)


def other_model(random: random.Random, folder: Path) -> None:
    """A file of another save: what a reader sees between two writes."""
    name = random.choice([CONFIG, weights(folder).name])
    other = folder.parent / random.choice(["other", "other formats"]) / name
    if other.exists():
        shutil.copy(other, folder / name)


def edit_index(random: random.Random, folder: Path) -> None:
    file = folder / INDEX
    if not file.exists():
        return flip(random, folder / CONFIG)
    if random.random() < 0.3:
        return flip(random, file)

    def edit(index: dict[str, Any]) -> None:
        places, outside = index["weight_map"], str(folder.parent / "other" / WEIGHTS)
        name = random.choice(list(places))
        match random.randrange(4):
            case 0:
                del places[name]
            case 1:
                places[name] = random.choice(list(places.values()))
            case 2:
                places[name] = random.choice(["../other/" + WEIGHTS, outside, "", 5])
            case _:
                index["weight_map"] = dict.fromkeys(places, random.choice(["../other/" + WEIGHTS, outside]))

    return edit_json(file, edit)


MUTATIONS: dict[str, Mutation] = {
    "bit of the weights": lambda r, f: flip(r, weights(f)),
    "bit of the payload": lambda r, f: flip(r, weights(f), header_size(weights(f))),
    "bit of the header": lambda r, f: flip(r, weights(f), 0, header_size(weights(f))),
    "bit of config.json": lambda r, f: flip(r, f / CONFIG),
    "tensors swapped": swap_tensors,
    "scales swapped": swap_scales,
    "not finite": not_finite,
    "renamed": rename,
    "relabelled": relabel,
    "truncated": truncate,
    "appended": append,
    "sector of zeros": zeros,
    "other format": other_format,
    "other setting": edit_setting,
    "digests lost": lose_digests,
    "file of another model": other_model,
    "index": edit_index,
}


def write_models(root: Path) -> dict[str, torch.Tensor]:
    """Checkpoints to damage, `DAMAGED`, and others to take files from. Returns: the logits of each."""
    config = FLIQSConfig(
        weight_format="int4",
        activation_format="int8",
        overrides={"*.fc1": {"weight": "e2m1"}, "*.q_proj": {"weight": "e4m3"}, "*.o_proj": {"weight": "int6"}},
        modules_to_not_convert=["layers.1.mlp.fc2"],
    )
    expected = {}
    for name, size in (("whole", "50GB"), ("shards", "9KB")):
        packed = quantize(tiny("vit"), copy.deepcopy(config))
        packed.save_pretrained(root / name, max_shard_size=size)
        expected[name] = logits(packed)
    for name, seed, activation in (("other", 1, "int8"), ("other formats", 0, "e4m3")):
        other = copy.deepcopy(config)
        other.activation_format = activation
        packed = quantize(tiny("vit", seed), other)
        packed.save_pretrained(root / name)
        expected[name] = logits(packed)
    return expected


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(images()).logits
    return answer


def fuzz(rounds: int, seed: int, root: Path) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Returns: how often a kind of damage had an outcome; descriptions of damage that changed logits silently."""
    counts: Counter[tuple[str, str]] = Counter()
    silent = []
    expected = write_models(root)
    for number in range(rounds):
        generator = random.Random(f"{seed} {number}")
        kind, name = list(MUTATIONS)[number % len(MUTATIONS)], generator.choice(DAMAGED)
        folder = root / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / name, folder)
        MUTATIONS[kind](generator, folder)
        try:
            model = AutoModelForImageClassification.from_pretrained(folder)
            # A file of another model may make this one that model: the weights of "other formats" are the same.
            whole = expected.values() if kind == "file of another model" else [expected[name]]
            found = logits(model)
            outcome = "same logits" if any(torch.equal(found, known) for known in whole) else "OTHER LOGITS"
        except FliqsError:
            outcome = "FliqsError"
        except Exception as error:  # Transformers reads config.json before any hook: what it raises is not silent
            outcome = type(error).__name__
        if outcome == "OTHER LOGITS":
            silent.append(f"{kind}, {name}, round {number}, seed {seed}")
        counts[kind, outcome] += 1
    return counts, silent


@pytest.mark.filterwarnings("ignore")
def test_no_damage_changes_logits_silently(tmp_path: Path) -> None:
    counts, silent = fuzz(ROUNDS, 1, tmp_path)
    assert silent == []
    by_outcome: Counter[str] = Counter()
    for (_, outcome), count in counts.items():
        by_outcome[outcome] += count
    assert by_outcome["FliqsError"] > ROUNDS / 2
    # Damage to the payload is always found here, not by what happens to read it.
    for kind in ("bit of the payload", "scales swapped", "not finite", "truncated"):
        assert {outcome for known, outcome in counts if known == kind} == {"FliqsError"}, kind


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        found, wrong = fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(temporary))
    for (damage, outcome), count in sorted(found.items()):
        print(f"{damage:24}{outcome:16}{count:6}")
    print(f"{sum(found.values())} rounds, {len(wrong)} with other logits", *wrong, sep="\n")
