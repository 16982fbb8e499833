"""The usual objective of a multi-trial search: train an allocation for a few steps and score it on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import QuantizerSettings, make_searchable, restore
from fliqs_hf.nn.evaluation import modes_kept
from fliqs_hf.oneshot.hook import FixedFormats
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task
from fliqs_hf.training import ImageData, TrainConfig, evaluate, train
from fliqs_hf.training.seeds import derived_seed


class ShortTraining:
    """−mean cross-entropy on a held-out part of the training split, after `config.max_steps` steps in an allocation.

    Every trial starts from the weights that the model has now and sees the same batches, so that trials differ in
    nothing but their formats. The model itself is left as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerInfo],
        data: ImageData,
        config: TrainConfig,
        accelerator: Any,
        *,
        holdout: float = 0.1,
        settings: QuantizerSettings | None = None,
        teacher: nn.Module | None = None,
        task: Task = IMAGE_CLASSIFICATION,
    ) -> None:
        """
        Args:
            model: plain, in fp32, on its device.
            layers: the layers that allocations name.
            data: the training split; the evaluation split must stay unseen.
            holdout: the share of `data` that trials are scored on and not trained with.
            teacher: see `train`.
        Raises: ConfigError: a `holdout` that leaves no image to train with or to score on.
        """
        count = round(holdout * len(data)) if isinstance(holdout, float) and 0 < holdout < 1 else 0
        if not 0 < count < len(data):
            raise ConfigError(
                f"holdout={holdout!r} of {len(data)} images must leave some on both sides: choose between 0 and 1"
            )
        generator = torch.Generator().manual_seed(derived_seed("holdout", config.seed))
        order = torch.randperm(len(data), generator=generator).tolist()
        # A subset has all that training and evaluation ask of `ImageData`: its length and its items.
        self.held_out: Any = Subset(data, order[:count])
        self.training: Any = Subset(data, order[count:])
        self.model, self.config, self.accelerator = model, config, accelerator
        self.layers = tuple(layer for layer in layers if layer.quantizable)
        self.settings, self.teacher, self.task = settings, teacher, task
        self.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def __call__(self, allocation: Allocation, number: int) -> float:
        formats = sorted(
            {f for pair in allocation.values() for f in (pair.weight, pair.activation) if f}, key=lambda f: f.name
        )
        groups = {layer.name: layer.input_group for layer in self.layers}
        names = [layer.name for layer in self.layers]
        switch = make_searchable(self.model, formats, names=names, input_groups=groups, settings=self.settings)
        try:
            with modes_kept(self.model):
                hook = FixedFormats(switch, allocation)
                train(
                    self.model, self.training, self.config, self.accelerator,
                    hook=hook, teacher=self.teacher, name=f"trial {number}", task=self.task,
                )  # fmt: skip
                return -evaluate(self.model, self.held_out, self.accelerator, task=self.task).loss
        finally:
            restore(self.model)
            self.model.load_state_dict(self.start)
