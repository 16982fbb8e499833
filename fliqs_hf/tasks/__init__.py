"""Tasks: one file each; `register_task` adds one of your own."""

from fliqs_hf.tasks.classification import IMAGE_CLASSIFICATION, Accuracy, ImageClassification
from fliqs_hf.tasks.segmentation import SEMANTIC_SEGMENTATION, SemanticSegmentation
from fliqs_hf.tasks.task import Losses, Score, Task, find_task, recorded, register_task, tasks, unregister_task

__all__ = [
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "Accuracy",
    "ImageClassification",
    "Losses",
    "Score",
    "SemanticSegmentation",
    "Task",
    "find_task",
    "recorded",
    "register_task",
    "tasks",
    "unregister_task",
]
