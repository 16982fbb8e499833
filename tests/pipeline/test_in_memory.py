"""`fliqs_hf.search`: the recipe in one call."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ViTImageProcessor

import fliqs_hf
from fliqs_hf import SearchConfig, Target
from fliqs_hf.cost import bops
from fliqs_hf.errors import CheckpointError, ConfigError, DataError, HubError, TargetError
from fliqs_hf.nn import packed_layers
from tests.helpers.models import images, tiny

BITS = Target.of(target_bits=4)
SETTINGS: dict[str, Any] = {
    "config": SearchConfig(prior_images=16, explore_fraction=0.5),
    "search_space": ["int3", "int4", "e2m1", "int8"],
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
}


def processor() -> Any:
    side = tiny("vit").config.image_size
    return ViTImageProcessor(size={"height": side, "width": side})


def pairs(count: int = 24) -> list[tuple[Tensor, int]]:
    return [(pixels, i % 5) for i, pixels in enumerate(images(count))]


def test_one_call_searches_trains_packs_and_evaluates(tmp_path: Path) -> None:
    model, data, run = tiny("vit"), pairs(), tmp_path / "run"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fliqs_hf.search(
        model, data, BITS, eval_data=data[:10], processor=processor(), output_dir=run, finetune_steps=2, **SETTINGS
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not packed_layers(model)
    assert result.cost == bops(result.layers, result.allocation) and 0.97 <= result.cost / result.target_cost <= 1
    assert result.metrics["accuracy"]["searched"]["n"] == 10
    assert result.run == run and (run / "README.md").exists() and (run / "fliqs/report.html").exists()
    loaded = AutoModelForImageClassification.from_pretrained(run)
    assert len(packed_layers(loaded)) == len(result.allocation)
    result.save_pretrained(tmp_path / "copy")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "copy")
    batch = torch.stack([pixels for pixels, _ in data[:4]])
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, result.model(batch).logits)
        assert torch.equal(again(batch).logits, result.model(batch).logits)
    with pytest.raises(ConfigError, match="holds a run already: give resume=True"):
        fliqs_hf.search(model, data, BITS, eval_data=data, processor=processor(), output_dir=run, **SETTINGS)


def test_a_search_that_names_no_folder_has_one_that_can_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `Trainer`, in the working directory; an earlier result is not replaced unasked, and one can be resumed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda *_, **__: pytest.fail("a folder that nobody finds"))
    given = {"eval_data": pairs(8), "processor": processor(), **SETTINGS}
    result = fliqs_hf.search(tiny("vit"), pairs(8), BITS, **given)
    assert result.run == Path("search_output") and "search_output" in capsys.readouterr().out
    assert result.model.name_or_path == "search_output"
    assert {path.name for path in tmp_path.iterdir()} == {"search_output"}
    with pytest.raises(ConfigError, match=r"search_output holds a run already: .*overwrite_output_dir=True"):
        fliqs_hf.search(tiny("vit"), pairs(8), BITS, **given)
    with pytest.raises(CheckpointError, match="was started with target="):
        fliqs_hf.search(tiny("vit"), pairs(8), Target.of(target_bits=7.0), **given, resume=True)
    again = fliqs_hf.search(tiny("vit"), pairs(8), BITS, **given, resume=True)
    assert again.allocation == result.allocation and again.metrics == result.metrics


def test_layers_keep_to_rules_and_the_report_says_so(tmp_path: Path) -> None:
    given = {"eval_data": pairs(8), "processor": processor(), "output_dir": tmp_path / "run", **SETTINGS}
    found = fliqs_hf.search(
        tiny("vit"), pairs(8), BITS, require={"classifier": ["int8"]}, min_bits={"*patch_embeddings*": 4}, **given
    ).allocation
    assert found["classifier"].weight.name == found["classifier"].activation.name == "int8"
    (name,) = (name for name in found if "patch_embeddings" in name)
    assert min(found[name].weight.bits, found[name].activation.bits) >= 4
    assert "held by --require classifier=int8" in (tmp_path / "run/fliqs/report.html").read_text(encoding="utf-8")
    with pytest.raises(CheckpointError, match="was started with require="):
        fliqs_hf.search(tiny("vit"), pairs(8), BITS, **given, resume=True)


@pytest.mark.parametrize("floor", [{"min_accuracy": 78}, {"max_drop": -1}, {"max_drop": 1, "confidence": 95}], ids=str)
def test_a_floor_that_means_nothing_is_refused(floor: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=list(floor)[-1]):
        fliqs_hf.search(tiny("vit"), pairs(8), BITS, eval_data=pairs(8), output_dir=tmp_path / "run", **floor)
    assert not (tmp_path / "run").exists()


def test_data_of_all_kinds_give_the_same_search(tmp_path: Path) -> None:
    """Pairs, dictionaries as a transform of `datasets` gives them, and columns of images."""
    prepare, names = processor(), [f"LABEL_{i}" for i in range(5)]
    noise = torch.randint(256, (24, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = [{"image": Image.fromarray(x.numpy()), "label": i % 5} for i, x in enumerate(noise)]
    columns = datasets.Dataset.from_list(rows, features=features)
    tensors = [prepare(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0] for row in columns]
    as_pairs = [(pixels, i % 5) for i, pixels in enumerate(tensors)]
    as_dictionaries = [{"pixel_values": pixels, "labels": label} for pixels, label in as_pairs]
    found = []
    for data in (as_pairs, as_dictionaries, columns, datasets.DatasetDict(train=columns, validation=columns)):
        given = {} if isinstance(data, dict) else {"eval_data": data}
        given |= {"processor": prepare, "output_dir": tmp_path / str(len(found))}
        found.append(fliqs_hf.search(tiny("vit"), data, BITS, **given, **SETTINGS))
    first = found[0].model.state_dict()
    for other in found[1:]:
        assert other.allocation == found[0].allocation and other.metrics == found[0].metrics
        assert all(torch.equal(tensor, first[name]) for name, tensor in other.model.state_dict().items())


@pytest.mark.parametrize(("changes", "error", "words"), [
    ({"eval_data": None}, ConfigError, "give eval_data="),
    ({"data": {"test": pairs(8)}}, ConfigError, "trains with 'train'"),
    ({"data": DataLoader(pairs(8))}, ConfigError, "give its dataset"),
    ({"data": 5}, ConfigError, "has a length"),
    ({"data": []}, DataError, "the dataset is empty"),
    ({"data": [5] * 8}, DataError, "item 0 is a int"),
    ({"data": [(torch.zeros(2), 0)] * 8}, DataError, "pixel values are floats"),
    ({"eval_data": [(images(1)[0], 7)]}, DataError, "item 0: the label 7 is not a class of the model, 0 to 4"),
    ({"processor": None}, ConfigError, "give processor="),
    ({"max_stepz": 5}, ConfigError, "no argument 'max_stepz'; did you mean 'max_steps'"),
    ({"max_steps": 0}, ConfigError, "max_steps=0 must be at least 1"),
    ({"max_steps": "ten"}, ConfigError, r"search\(\): max_steps has the value 'ten', but must be int"),
    ({"num_train_epochs": 1}, ConfigError, "give max_steps=6 or num_train_epochs=1.0, not both"),
    ({"lr": 1e-3}, ConfigError, "no argument 'lr'; use learning_rate"),
    ({"learning_rate": -1.0}, ConfigError, "learning_rate=-1.0 must be above 0"),
    ({"seed": -1}, ConfigError, "seed=-1 must be at least 0"),
    ({"per_device_eval_batch_size": 0}, ConfigError, "per_device_eval_batch_size=0 must be at least 1"),
    ({"lr_scheduler_type": "cosin"}, ConfigError, "lr_scheduler_type has the value 'cosin'"),
    ({"report_to": "nowhere"}, ConfigError, "report_to='nowhere' is not available"),
    ({"run_name": "pilot"}, ConfigError, "run_name='pilot' is for trackers"),
    ({"hub_model_id": "a/b/c"}, HubError, "hub_model_id"),
    ({"bf16": True, "mixed_precision": "no"}, ConfigError, "bf16=True contradicts"),
    ({"require": {"classifier": "int5"}}, ConfigError, "'classifier' has int5, which is not in the search space"),
    ({"require": {"classifier": ["int3"]}, "min_bits": {"*": 4}}, ConfigError, "require and min_bits leaves"),
    ({"require": ["int8"]}, ConfigError, "give patterns of layer names"),
    ({"min_bits": {"nothing": 4}}, ConfigError, "min_bits: 'nothing' matches none of"),
    ({"tie": "qkv"}, ConfigError, "tie='qkv'"),
    ({"modules_to_not_convert": "classifier"}, ConfigError, "modules_to_not_convert='classifier': give a list"),
    ({"label_column": "fine"}, ConfigError, "the column 'fine' is of a datasets.Dataset with images"),
    ({"label_column": " "}, ConfigError, "label_column_name=' ' is empty"),
    ({"target": Target.of(target_bits=1)}, TargetError, "target"),
])  # fmt: skip
def test_what_cannot_work_is_refused(
    changes: dict[str, Any], error: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"data": pairs(8), "eval_data": pairs(8), "target": BITS, "processor": processor(), **SETTINGS, **changes}
    with pytest.raises(error, match=words):
        fliqs_hf.search(tiny("vit"), given.pop("data"), given.pop("target"), **given)
    assert not (tmp_path / "search_output").exists()
