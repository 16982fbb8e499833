"""Data, one training loop on accelerate, and evaluation."""

from fliqs_hf.interrupt import Interrupted
from fliqs_hf.tasks import Accuracy
from fliqs_hf.training.data import ImageData
from fliqs_hf.training.evaluation import evaluate
from fliqs_hf.training.loop import StepHook, TrainConfig, train
from fliqs_hf.training.splits import load_splits

__all__ = ["Accuracy", "ImageData", "Interrupted", "StepHook", "TrainConfig", "evaluate", "load_splits", "train"]
