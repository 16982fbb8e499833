"""Data, one training loop on accelerate, and evaluation."""

from fliqs_hf.interrupt import Interrupted
from fliqs_hf.tasks import Accuracy
from fliqs_hf.training.backends import load_models_whole
from fliqs_hf.training.config import TrainConfig
from fliqs_hf.training.data import ImageData
from fliqs_hf.training.evaluation import evaluate
from fliqs_hf.training.loop import train
from fliqs_hf.training.splits import load_splits
from fliqs_hf.training.step import StepHook

__all__ = [
    "Accuracy",
    "ImageData",
    "Interrupted",
    "StepHook",
    "TrainConfig",
    "evaluate",
    "load_models_whole",
    "load_splits",
    "train",
]
