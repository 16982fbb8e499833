"""The fp32 model: names of its classes, its image size and channels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image

from fliqs_hf.errors import ConfigError
from fliqs_hf.training.images import resize_to
from fliqs_hf.training.models import label_ids, load_classifier
from tests.helpers.models import tiny
from tests.training.test_data import PROCESSOR

FLOWERS = ["daisy", "iris", "lily", "rose", "tulip"]
PLANES = ["airplane", "bird", "cat", "deer", "ship"]
GENERIC = [f"LABEL_{index}" for index in range(5)]
NUMBERS = list("01234")
WORDNET = ["n01440764", "n01443537", "n01484850", "n01491361", "n01494475"]


def load(folder: Path, own: list[str], names: list[str], caplog: pytest.LogCaptureFixture) -> tuple[Any, list[str]]:
    """The model that a data set of `names` gets from a checkpoint of `own`, and the warnings."""
    model = tiny("vit")
    model.config.id2label = dict(enumerate(own))
    model.config.label2id = {name: index for index, name in enumerate(own)}
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fliqs_hf"):
        loaded, _, trained = load_classifier(names, model_name_or_path=str(folder))
    assert trained and torch.equal(loaded.classifier.weight, model.classifier.weight)  # the head is kept
    return loaded, [record.getMessage() for record in caplog.records if record.name.startswith("fliqs_hf")]


@pytest.mark.parametrize(
    ("own", "names", "delivered"),
    [
        (PLANES, FLOWERS, FLOWERS),
        (PLANES, [*PLANES[:4], "boat"], [*PLANES[:4], "boat"]),
        (GENERIC, FLOWERS, FLOWERS),
        (GENERIC, NUMBERS, NUMBERS),
        (PLANES, WORDNET, PLANES),
        (PLANES, NUMBERS, PLANES),
        (PLANES, GENERIC, PLANES),
    ],
)
def test_other_names_in_the_same_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, own: list[str], names: list[str], delivered: list[str]
) -> None:
    model, warnings = load(tmp_path, own, names, caplog)
    assert list(model.config.id2label.values()) == delivered
    assert model.config.label2id == {name: index for index, name in enumerate(delivered)}
    assert label_ids(names, model) is None  # index by index
    index = next(i for i in range(5) if own[i] != names[i])
    assert len(warnings) == 1
    assert f"class {index} is {own[index]!r} in the checkpoint and {names[index]!r} in the data set" in warnings[0]
    assert f"names of the {'data set' if delivered == names else 'checkpoint'}" in warnings[0]


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (PLANES, None),
        ([name.upper() for name in PLANES], None),
        ([f" {n.title()}" for n in PLANES[::-1]], [4, 3, 2, 1, 0]),
    ],
)
def test_the_same_names_are_matched_in_any_order_and_case(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: list[str], ids: list[int] | None
) -> None:
    model, warnings = load(tmp_path, PLANES, names, caplog)
    assert list(model.config.id2label.values()) == PLANES and not warnings
    assert label_ids(names, model) == ids


PROCESSORS = [
    "ViT",
    "DeiT",
    "ConvNext",
    "PoolFormer",
    "CLIP",
    "Levit",
    "MobileViT",
    "Perceiver",
    "EfficientNet",
    "Bit",
]


@pytest.mark.parametrize("side", [112, 224, 384])
@pytest.mark.parametrize("name", PROCESSORS)
def test_every_processor_makes_squares_of_the_size_given(tmp_path: Path, name: str, side: int) -> None:
    processor = getattr(hf, f"{name}ImageProcessorPil")()
    resize_to(processor, side)
    processor.save_pretrained(tmp_path)
    for one in (processor, type(processor).from_pretrained(tmp_path)):
        for size in ((500, 375), (375, 500), (40, 30)):
            values = one(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"]
            assert values.shape == (1, 3, side, side)


def test_a_crop_keeps_its_share_of_the_image() -> None:
    processor = hf.DeiTImageProcessorPil(size={"height": 256, "width": 256}, crop_size={"height": 224, "width": 224})
    resize_to(processor, 112)
    assert dict(processor.size) == {"height": 128, "width": 128}
    assert dict(processor.crop_size) == {"height": 112, "width": 112} and processor.do_center_crop


def test_a_processor_without_crop_makes_squares_of_the_whole_image() -> None:
    processor = hf.CLIPImageProcessorPil(do_center_crop=False)  # 224 × 336 pixels of a 2:3 image
    resize_to(processor, 112)
    assert processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"].shape == (1, 3, 112, 112)


def test_a_processor_that_cannot_is_named() -> None:
    with pytest.raises(ConfigError, match=r"image_size=112 cannot be set for ImageGPTImageProcessorPil.*Clusters"):
        resize_to(hf.ImageGPTImageProcessorPil(), 112)
    with pytest.raises(ConfigError, match=r"ViTImageProcessorPil.*makes \(3, 64, 96\), not \(3, 112, 112\)"):
        resize_to(hf.ViTImageProcessorPil(do_resize=False), 112)


def test_a_checkpoint_whose_processor_knows_the_shortest_edge_alone(tmp_path: Path) -> None:
    tiny("resnet").save_pretrained(tmp_path)
    hf.ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(tmp_path)
    _, processor, _ = load_classifier(FLOWERS, model_name_or_path=str(tmp_path), image_size=112)
    assert processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"].shape == (1, 3, 112, 112)


def test_grey_models_are_refused_when_they_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vit takes images of num_channels=1.*RGB"):
        load_classifier(FLOWERS, model_type="vit", config_overrides={"num_channels": 1})
    config = tiny("vit").config
    config.num_channels = 1
    hf.ViTForImageClassification(config).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} takes images of num_channels=1"):
        load_classifier(FLOWERS, model_name_or_path=str(tmp_path))
