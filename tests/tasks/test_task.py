"""What the rest of the package asks of a task: answers compared image by image, and columns of data sets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fliqs_hf.cli.data import columns
from fliqs_hf.errors import ConfigError, DataError
from fliqs_hf.pipeline.job import with_columns
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task, register_task, unregister_task
from fliqs_hf.training.arguments import DataArguments


class Pixels(Task):
    name, model, models, measure = "pixels", "AutoModelForSemanticSegmentation", "a segmenter", "mean IoU"
    columns = ("scan", "truth")


@pytest.fixture
def task() -> Iterator[Task]:
    yield register_task(Pixels())
    unregister_task("pixels")


def test_answers_are_compared_image_by_image() -> None:
    answers = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    others = torch.tensor([[[0, 1], [2, 9]], [[4, 5], [6, 7]]])
    assert Pixels().same(answers, others).tolist() == [0.75, 1.0]
    assert Pixels().right(answers, others).tolist() == [False, True]
    assert IMAGE_CLASSIFICATION.same(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])).tolist() == [1.0, 0.0, 1.0]
    assert IMAGE_CLASSIFICATION.right(torch.tensor([1, 2]), torch.tensor([1, 0])).tolist() == [True, False]


def test_what_classifiers_are_asked_besides() -> None:
    """Against NumPy: the place of each label among the sorted logits, and the softmax written out."""
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % 7
    place = (np.argsort(-logits.numpy(), axis=1) == labels.numpy()[:, None]).argmax(1)
    for count in (1, 5, 9):
        assert IMAGE_CLASSIFICATION.among_first(logits, labels, count).tolist() == (place < count).tolist()
    assert IMAGE_CLASSIFICATION.right(IMAGE_CLASSIFICATION.answers(logits), labels).tolist() == (place == 0).tolist()
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    # Two orders of summing seven numbers below 20.
    assert np.allclose(IMAGE_CLASSIFICATION.confidence(logits).numpy(), shares.max(1), rtol=1e-14)
    assert IMAGE_CLASSIFICATION.size(logits) == 7
    for shape in ((4, 1), (4,), (4, 3, 2)):
        with pytest.raises(DataError, match="not \\[images, two classes or more\\]"):
            IMAGE_CLASSIFICATION.size(torch.zeros(shape))


def test_columns_that_no_argument_names_are_the_tasks(task: Task) -> None:
    """And those of classification are what records have always had, so that runs begun before can be resumed."""
    for of, expected in ((IMAGE_CLASSIFICATION, ("image", "label")), (task, ("scan", "truth"))):
        found = with_columns(DataArguments(), of)
        assert (found.image_column_name, found.label_column_name) == expected
        found = with_columns(DataArguments(label_column_name="mask"), of)
        assert (found.image_column_name, found.label_column_name) == (expected[0], "mask")
        args = argparse.Namespace(task=of.name, image_column=None, label_column="mask")
        assert columns(args) == (expected[0], "mask")
    with pytest.raises(ConfigError, match="task='none' does not exist"):
        columns(argparse.Namespace(task="none"))
    with pytest.raises(ConfigError, match="match_labels='index' is for tasks with one class per image"):
        columns(argparse.Namespace(task="image-segmentation", match_labels="index"))
