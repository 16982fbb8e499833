"""Semantic segmentation: its measures against sums by hand, and SegFormer from search to a file of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor, ViTImageProcessor

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.nn import packed_layers
from fliqs_hf.pipeline.export import export
from fliqs_hf.pipeline.search import main
from fliqs_hf.tasks import SEMANTIC_SEGMENTATION as TASK
from fliqs_hf.training.masks import highest_class
from fliqs_hf.training.pixels import PixelData
from fliqs_hf_cli import main as command
from tests.recipes.test_vit import write

TINY: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3],
    "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 16, "num_labels": 4,
}  # fmt: skip


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A SegFormer and images that are red, green or blue where they are of class 0, 1 or 2; their top has no class."""
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(SegformerConfig(**TINY)).save_pretrained(tmp_path / "fp32")
    SegformerImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "fp32")
    generator, rows = np.random.default_rng(0), {"image": [], "label": []}
    for _ in range(24):
        mask = np.kron(generator.integers(0, 3, (2, 2)), np.ones((8, 8))).astype(np.uint8)
        pixels = 255 * np.eye(3, dtype=np.uint8)[mask]
        mask[0] = 255
        rows["image"].append(Image.fromarray(pixels))
        rows["label"].append(Image.fromarray(mask))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    data = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "data").mkdir()
    data.select(range(16)).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    data.select(range(16, 24)).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    return tmp_path


def test_measures_are_sums_over_pixels_that_have_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 4, 6, 5, generator=generator)
    target = torch.randint(0, 3, (3, 6, 5), generator=generator)
    target[0, :2] = 255
    found, log = prediction.argmax(1), prediction.log_softmax(1)
    losses, shares, overlaps = [], [], {c: [0, 0] for c in range(4)}
    for image in range(3):
        places = [(r, c) for r in range(6) for c in range(5) if target[image, r, c] != 255]
        truths = [int(target[image, r, c]) for r, c in places]
        losses.append(np.mean([-float(log[image, t, r, c]) for t, (r, c) in zip(truths, places, strict=True)]))
        shares.append(np.mean([int(found[image, r, c]) == t for t, (r, c) in zip(truths, places, strict=True)]))
        for truth, (r, c) in zip(truths, places, strict=True):
            taken = int(found[image, r, c])
            for label in {truth, taken}:
                overlaps[label][0] += truth == taken
                overlaps[label][1] += 1
    # Means of 90 numbers in float32 and in float64.
    assert float(TASK.loss(prediction, target)) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(TASK.quality(prediction, target)) == pytest.approx(np.mean(shares), rel=1e-6)
    counts = TASK.counts(prediction[:2], target[:2]) + TASK.counts(prediction[2:], target[2:])
    score = TASK.score(counts.tolist(), 3, 0.5, {})
    assert score.value == pytest.approx(np.mean([right / either for right, either in overlaps.values() if either]))
    assert (score.key, score.n) == ("mean_iou", 3)
    nothing = torch.full_like(target, 255)
    assert float(TASK.loss(prediction, nothing)) == 0 and TASK.score([0.0] * 8, 3, 0.0, {}).value == 0


def test_masks_are_read_as_numbers(case: Path) -> None:
    split = datasets.load_dataset("parquet", data_dir=str(case / "data"), split="train")
    processor = SegformerImageProcessor(size={"height": 16, "width": 16})
    assert highest_class(split, "label", 255, processor) == 2
    reduces = SegformerImageProcessor(size={"height": 16, "width": 16}, do_reduce_labels=True)
    assert highest_class(split, "label", 255, reduces) == 1
    found = {int(x) for i in range(16) for x in TASK.data(split, reduces, 2)[i][1].unique()}
    assert found == {0, 1, 255}
    pixels, classes = TASK.data(split, processor, 3)[0]
    assert pixels.shape == (3, 16, 16) and classes.shape == (16, 16) and classes[0].unique().tolist() == [255]
    colours = torch.stack([pixels[:, 4, 4], pixels[:, 12, 12]]).argmax(1)  # red, green, blue
    assert colours.tolist() == [int(classes[4, 4]), int(classes[12, 12])]
    with pytest.raises(DataError, match=r"has pixels of class .* but the model has 1 classes"):
        [TASK.data(split, processor, 1)[i] for i in range(4)]
    with pytest.raises(DataError, match=r"are uint8 .*not numbers from 0 to 255 for each pixel"):
        TASK.data(split, processor, 3, label_column="image")[0]
    with pytest.raises(ConfigError, match=r"ViTImageProcessor.* takes no segmentation_maps"):
        TASK.data(split, ViTImageProcessor(), 3)


def test_the_head_stays_where_the_processor_leaves_out_the_background(case: Path) -> None:
    """As ADE20K has it: masks 0 to N, a head of N classes."""
    train, held_out = (
        datasets.load_dataset("parquet", data_dir=str(case / "data"), split=split) for split in ("train", "validation")
    )
    reduces = SegformerImageProcessor(do_reduce_labels=True)
    assert TASK.classes(train, held_out, "label", SegformerImageProcessor())[2] == ["0", "1", "2"]
    assert TASK.classes(train, held_out, "label", reduces)[2] == ["0", "1"]
    few = train.map(lambda row: {"label": Image.fromarray(np.minimum(np.array(row["label"]), 1))})
    assert TASK.classes(few, held_out, "label", SegformerImageProcessor())[2] == ["0", "1", "2"]  # of both splits
    with pytest.raises(DataError, match="fewer than two classes"):
        TASK.classes(few, few, "label", reduces)


@pytest.mark.parametrize(("label", "words"), [
    (np.full((4, 4), 7), "pixels of class 7, but the model has 4 classes"),
    (np.full((4, 4), -1), "pixels of class -1, but the model has 4 classes"),
    (np.zeros((4, 4)), r"torch.float64 \[4, 4\], not whole numbers"),
    (np.zeros((1, 4, 4), dtype=np.int64), r"\[1, 4, 4\], not whole numbers"),
    ("mask.png", "the label is a str"),
    (None, "the label is a NoneType"),
])  # fmt: skip
def test_targets_without_a_meaning_are_refused_by_name(label: Any, words: str) -> None:
    pixels = torch.zeros(3, 4, 4)
    with pytest.raises(DataError, match=f"item 0: .*{words}"):
        PixelData([(pixels, label)], 4, TASK)[0]
    found = PixelData([(pixels, np.full((4, 4), 255, dtype=np.uint8))], 4, TASK)[0][1]
    assert found.dtype == torch.int64 and found.unique().tolist() == [255]


def test_losses_count_images_with_foreign_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(3, 4, 6, 5, generator=generator)
    target = torch.randint(0, 4, (3, 6, 5), generator=generator)
    losses = TASK.losses()
    assert torch.equal(losses(prediction, target), 3 * TASK.loss(prediction, target)) and losses.images == 3
    target[1, 0, 0], target[2, 0, 0] = 4, 255
    with pytest.raises(DataError, match=r"1 of 3 images have pixels of a class that is not one of the model's 4"):
        TASK.losses()(prediction, target)
    assert TASK.counts(prediction, target).shape == (8,)  # what is refused later, where a look would wait for a GPU
    for bad in (target.to(torch.uint8), target[:, 0], target[:2], target.float()):
        with pytest.raises(ConfigError, match="are not those of a segmenter"):
            TASK.losses()(prediction, bad)


@pytest.mark.slow
def test_a_segmenter_from_search_to_export(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "task": TASK.name, "model_type": None, "config_overrides": None, "image_size": None, "cache_images": True,
        "model_name_or_path": str(case / "fp32"), "dataset_name": str(case / "data"), "finetune_steps": 30,
        "max_steps": 6, "learning_rate": 3e-3, "search_space": ["int4", "int8"], "target_bits": [6.0],
        "max_train_samples": None, "max_eval_samples": None,
    }  # fmt: skip
    (result,) = main([str(write(case, **settings))])
    run = Path(result["run"])
    accuracy = result["accuracy"]
    assert accuracy["fp32"]["measure"] == "mean IoU" and 0.5 < accuracy["fp32"]["value"] <= 1
    assert 0 < accuracy["searched"]["value"] <= 1
    model = SegformerForSemanticSegmentation.from_pretrained(run)
    assert len(packed_layers(model)) > 10 and model.config.num_labels == 4  # the head stays: class 3 is not shown
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-segmentation" in card and "mean IoU" in card
    assert "AutoModelForSemanticSegmentation" in card
    assert "mean IoU" in (run / "fliqs/report.html").read_text(encoding="utf-8")
    exported = export(run, case / "exported", to="torch", task=TASK.name)
    # The program sums some products in another order than the model; a float32 has seven digits.
    assert exported.agreement.percent == 100 and exported.agreement.rms < 1e-5
    with pytest.raises(ConfigError, match="metrics is for tasks with one class per image"):
        main([str(write(case, **settings, metrics=["accuracy"]))])
    with pytest.raises(ConfigError, match="images of the task 'image-segmentation' are right in part"):
        main([str(write(case, **settings, max_drop=1.0, output_dir=str(case / "floor")))])
    given = ["validate", str(case / "fp32"), str(run), "--task", TASK.name, "--dataset_name", str(case / "data")]
    assert command(given) == 2 and "are right in part" in capsys.readouterr().err
    packed = ["quantize", str(case / "fp32"), str(case / "packed"), "--task", TASK.name, "--target_bits", "6",
              "--search_space", "int4,int8", "--calibration", str(case / "data"), "--batch_size", "8"]  # fmt: skip
    assert command(packed) == 0
    assert json.loads((case / "packed/fliqs/results.json").read_text())["cost"]["target_ratio"] <= 1
