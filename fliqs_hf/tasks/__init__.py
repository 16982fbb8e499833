"""Tasks: one file each; `register_task` adds one of your own."""

from fliqs_hf.tasks.classification import IMAGE_CLASSIFICATION, Accuracy, ImageClassification
from fliqs_hf.tasks.task import Losses, Score, Task, find_task, recorded, register_task, tasks, unregister_task

__all__ = [
    "IMAGE_CLASSIFICATION",
    "Accuracy",
    "ImageClassification",
    "Losses",
    "Score",
    "Task",
    "find_task",
    "recorded",
    "register_task",
    "tasks",
    "unregister_task",
]
