"""Data: what is refused, and an order of images that depends on the seed and the position alone."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor

from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.training import ImageData, load_splits
from fliqs_hf.training.data import StepBatches, labelled
from fliqs_hf.training.models import interpolate_positions, label_ids, load_classifier

PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(labels: list[int], broken: int | None = None) -> datasets.Dataset:
    images = [
        {"bytes": b"not an image" if i == broken else png(i), "path": f"photo-{i}.png"} for i in range(len(labels))
    ]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_digits_are_real_and_split_once() -> None:
    train, test = load_splits("digits")
    assert (len(train), len(test)) == (1347, 450)
    assert train.features["label"].names == list("0123456789")
    from sklearn.datasets import load_digits

    originals = {digit.tobytes() for digit in (load_digits().images * (255 / 16)).round().astype(np.uint8)}
    mine = [np.asarray(image).tobytes() for split in (train, test) for image in split["image"]]
    assert len(mine) == 1797 and set(mine) == originals


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_head_is_named(label: int) -> None:
    with pytest.raises(DataError, match=rf"image 1 \(photo-1\.png\) has the label {label},.*3 classes"):
        ImageData(split_of([0, label, 2]), PROCESSOR, 3)


def test_an_unreadable_image_is_named() -> None:
    data = ImageData(split_of([0, 1, 2], broken=1), PROCESSOR, 3)
    assert data[0][0].shape == (3, 8, 8) and data[0][0].dtype is torch.float32
    with pytest.raises(DataError, match=r"image 1 \(photo-1\.png\)"):
        data[1]


def test_an_empty_split_a_missing_column_and_no_data() -> None:
    with pytest.raises(DataError, match="empty"):
        ImageData(split_of([]), PROCESSOR, 3)
    with pytest.raises(DataError, match=r"'img' does not exist.*image, label"):
        ImageData(split_of([0]), PROCESSOR, 3, image_column="img")
    with pytest.raises(DataError, match="no data"):
        load_splits()
    with pytest.raises(DataError, match="no-such-folder"):
        load_splits("./no-such-folder")


def test_an_image_folder_is_split(tmp_path: Path) -> None:
    for index in range(20):
        folder = tmp_path / "train" / ("cat" if index % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.png").write_bytes(png(index))
    train, held_out = load_splits(train_dir=str(tmp_path / "train"), train_val_split=0.25, seed=1)
    assert train.features["label"].names == ["cat", "dog"]
    assert (len(train), len(held_out)) == (15, 5)


@pytest.mark.parametrize(("count", "share"), [(1, 0.15), (2, 0.9)])
def test_images_too_few_to_hold_any_out(tmp_path: Path, count: int, share: float) -> None:
    (tmp_path / "cat").mkdir()
    for index in range(count):
        (tmp_path / "cat" / f"{index}.png").write_bytes(png(index))
    with pytest.raises(DataError, match=rf"'train' holds {count} images, too few.*train_val_split={share}"):
        load_splits(train_dir=str(tmp_path), train_val_split=share)


def test_cached_images_are_the_same() -> None:
    plain, cached = (ImageData(split_of([0, 1]), PROCESSOR, 3, cache=cache) for cache in (False, True))
    for _ in range(2):
        assert all(torch.equal(plain[i][0], cached[i][0]) for i in range(2))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_shows_every_image_once_over_all_ranks(world_size: int) -> None:
    per_epoch = StepBatches(60, 4, 7, 0, 1, 0, world_size).per_epoch
    seen = [
        index
        for rank in range(world_size)
        for batch in StepBatches(60, 4, 7, 0, per_epoch, rank, world_size)
        for index in batch
    ]
    assert len(seen) == len(set(seen)) == per_epoch * 4 * world_size


def test_batches_after_an_interruption_are_those_that_were_to_come() -> None:
    whole = list(StepBatches(50, 8, 3, 0, 40))
    assert list(StepBatches(50, 8, 3, 23, 40)) == whole[23:]
    assert list(StepBatches(50, 8, 4, 0, 40)) != whole
    assert whole[:6] != whole[6:12]  # another order in the second epoch


@pytest.mark.parametrize(("length", "sizes"), [(10, [5, 5]), (11, [5, 5]), (2, [1, 1])])
def test_a_split_smaller_than_a_batch_is_shared(length: int, sizes: list[int]) -> None:
    ranks = [list(StepBatches(length, 16, 0, 0, 3, rank, 2)) for rank in (0, 1)]
    for batches in zip(*ranks, strict=True):
        assert [len(batch) for batch in batches] == sizes and not set(batches[0]) & set(batches[1])
    with pytest.raises(DataError, match="1 images, fewer than the 2 processes"):
        StepBatches(1, 16, 0, 0, 3, 0, 2)


def column(values: list[object]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": values})


def test_classes_of_words_and_of_numbers() -> None:
    train, held_out, names = labelled(column(["dog", "cat", "dog"]), column(["cat"]), "label")
    assert names == ["cat", "dog"] and list(train["label"]) == [1, 0, 1] and list(held_out["label"]) == [0]
    numbers = list(range(11))
    train, _, names = labelled(column([*numbers[:5], *numbers[6:]]), column([5]), "label")
    assert names == [str(number) for number in numbers]  # in the order of numbers, also where one is missing
    assert list(train["label"]) == [*numbers[:5], *numbers[6:]]


@pytest.mark.parametrize(
    ("values", "name", "named"),
    [
        ([0.5], "label", "float"),
        ([], "label", "nothing"),
        (["a"], "label", "'b', which the training split lacks"),
        ([1], "class", "'class' does not exist.*label"),
    ],
)
def test_columns_that_are_no_classes(values: list[object], name: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        labelled(column(values), column(["b"]), name)


def test_classes_in_another_order_than_the_checkpoints() -> None:
    from tests.helpers.models import tiny

    model = tiny("vit")
    model.config.id2label = dict(enumerate("abcde"))
    assert label_ids(list("abcde"), model) is None and label_ids(list("vwxyz"), model) is None
    ids = label_ids(list("ebcda"), model)
    assert ids == [4, 1, 2, 3, 0]
    assert ImageData(split_of([0, 4, 1]), PROCESSOR, 5, label_ids=ids).labels == [4, 0, 1]
    assert label_ids(["E ", "B", "C", "D", "A"], model) == ids and label_ids(list("ABCDE"), model) is None


def test_names_that_occur_twice_or_differ_in_case_alone() -> None:
    """ImageNet has two classes "crane", in this order; letters have "a" and "A"."""
    from tests.helpers.models import tiny

    model = tiny("vit")
    model.config.id2label = dict(enumerate(["crane", "fox", "crane", "a", "A"]))
    assert label_ids(["crane", "fox", "crane", "a", "A"], model) is None
    assert label_ids(["fox", "A", "a", "crane", "crane"], model) == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("leading", [0, 1, 2])
def test_interpolated_positions(leading: int) -> None:
    """Leading tokens are kept, the same size is the identity, and rows stay rows: an embedding that depends on the
    row alone depends on the row alone afterwards, in the same order."""
    tokens = torch.randn(1, leading, 2)
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    embeddings = torch.cat([tokens, torch.stack([row, 2 * column], dim=-1).reshape(1, 64, 2)], dim=1)
    assert torch.equal(interpolate_positions(embeddings, 64 + leading), embeddings)
    for side in (4, 16):
        result = interpolate_positions(embeddings, side * side + leading)
        assert torch.equal(result[:, :leading], tokens)
        grid = result[0, leading:].reshape(side, side, 2)
        assert torch.allclose(grid[..., 0], grid[:, :1, 0].expand(side, side), atol=1e-5)  # float32 sums
        assert torch.allclose(grid[..., 1], 2 * grid[..., 0].T, atol=1e-5)
        assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()
    with pytest.raises(ConfigError, match=f"{64 + leading}"):
        interpolate_positions(embeddings, 70)


def test_load_classifier_needs_one_source() -> None:
    for arguments in ({}, {"model_type": "vit", "model_name_or_path": "x"}):
        with pytest.raises(ConfigError, match="either"):
            load_classifier(["a"], **arguments)


def test_a_checkpoint_for_another_size_and_other_classes(tmp_path: Path) -> None:
    from tests.helpers.models import tiny

    original = tiny("vit")
    original.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    model, processor, trained = load_classifier(["a", "b", "c"], model_name_or_path=str(tmp_path), image_size=16)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and not trained
    assert model(processor(Image.new("RGB", (30, 40)), return_tensors="pt")["pixel_values"]).logits.shape == (1, 3)
    for name, tensor in original.vit.state_dict().items():
        if not name.endswith("position_embeddings"):
            assert torch.equal(model.vit.state_dict()[name], tensor)
    assert model.vit.embeddings.position_embeddings.shape == (1, 5, 32)
