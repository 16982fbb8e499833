"""What every score is: one call, one record, and the sum over images that is under all of them."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fliqs_hf.errors import AllocationError, ConfigError, DataError
from fliqs_hf.nn import QuantizerSettings
from fliqs_hf.nn.evaluation import evaluation
from fliqs_hf.nn.kinds import kind_of
from fliqs_hf.selection.problem import SearchProblem
from fliqs_hf.selection.space import SearchSpace
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task

#: inputs of one batch -> predictions of the task, such as logits [batch, classes]
Forward = Callable[[Any], Tensor]
#: a tensor on the CPU -> its sum over all processes, the same on each
Combine = Callable[[Tensor], Tensor]
#: (the task's `Losses`, inputs, targets) -> what is summed over batches
OfBatch = Callable[[Any, Any, Tensor], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """Scores of one pass over calibration images, or of two.

    Attributes:
        decision_scores: for each choice of each decision, float32 [D, K], lower is better: where the score estimates
            it, the expected increase of the loss. Layers of a decision add up; where weights and inputs are decided
            apart, each is scored with the other in fp32.
        images: how many images were used.
        seconds: what it took.
        passes: 1: scores of the model as it was. 2: of `TwoPass`.
        method: the name of the score.
    """

    decision_scores: Tensor
    images: int
    seconds: float
    passes: int = 1
    method: str = "fisher"


class Repeatable:
    """Batches that are made anew each time that they are gone through. Args: make: gives an iterable."""

    def __init__(self, make: Callable[[], Iterable[tuple[Any, Tensor]]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return iter(self.make())


@dataclass(frozen=True)
class ScorePass:
    """What a score is measured on.

    Attributes:
        model: plain, or searchable with its switch disabled.
        batches: (inputs, targets of the task), such as labels, int64 [batch]. `TwoPass` without `first` goes through
            them twice, and needs a list or a `Repeatable`. A progress bar is the caller's.
        forward: inputs -> predictions of the task.
        choices: what is scored; a problem, where scores depend on its target.
        settings: of the quantizers.
        combine: where processes measure different images; all then get the scores of all images.
    """

    model: nn.Module
    batches: Iterable[tuple[Any, Tensor]]
    forward: Forward
    choices: SearchSpace | SearchProblem
    settings: QuantizerSettings = field(default_factory=QuantizerSettings)
    combine: Combine | None = None
    task: Task = IMAGE_CLASSIFICATION

    @property
    def space(self) -> SearchSpace:
        return self.choices.space if isinstance(self.choices, SearchProblem) else self.choices

    def layers(self) -> dict[str, nn.Module]:
        """The layers of the space, by name. Raises: AllocationError: the model lacks one."""
        modules = dict(self.model.named_modules())
        if missing := [layer.name for layer in self.space.layers if layer.name not in modules]:
            raise AllocationError(
                f"{missing[0]!r} of the search space is no layer of {type(self.model).__name__}: make the space from "
                "trace_layers(model) of this model"
            )
        return {layer.name: modules[layer.name] for layer in self.space.layers}

    @torch.no_grad()
    def weight_errors(self) -> Tensor:
        """‖Q(W) − W‖² of each layer in each format, float64 [L, K]."""
        rows = []
        for layer in self.layers().values():
            weight = kind_of(layer).rows(layer, layer.get_parameter("weight"))
            rounded = (self.settings.weights(weight, fmt) for fmt in self.space.formats)
            rows.append([float((one - weight).double().square().sum()) for one in rounded])
        return torch.tensor(rows, dtype=torch.float64)

    def summed(self, of_batch: OfBatch, fold: Callable[[Tensor], Tensor] = lambda total: total) -> tuple[Tensor, int]:
        """Go through the images once.

        Args:
            of_batch: a sum over the images of a batch, of one shape for all batches.
            fold: the sum over this process's batches, on the CPU -> what is summed over processes.
        Returns: that sum, and the number of images of all processes.
        Raises: DataError: no image, a target without a meaning, or a sum that is not finite.
        """
        losses, total = self.task.losses(), torch.zeros(())
        for number, (inputs, targets) in enumerate(self.batches):
            part = of_batch(losses, inputs, targets)
            total = total + part if number else part
        count, invalid = losses.images, int(losses.invalid)
        if not count:
            raise DataError("the sensitivity pass got no images: give it a split that is not empty")
        sums = fold(total.detach().cpu())
        if self.combine is not None:
            everyone = self.combine(torch.cat([sums.double().flatten(), torch.tensor([count, invalid]).double()]))
            sums, count, invalid = everyone[:-2].view_as(sums).to(sums.dtype), int(everyone[-2]), int(everyone[-1])
        losses.check(invalid, count)
        if not sums.isfinite().all():
            raise DataError("the sensitivity pass met a loss or gradient that is not finite: check images and model")
        return sums, count


class FormatScore(ABC):
    """How much each format of each layer hurts, in one way of finding out. Options are arguments of the constructor.

    Attributes:
        name: what callers and commands know it by.
        weights_only: inputs are not scored. Where weight and input share a format, the weight's score decides.
        most_images: beyond which it is too dear for comparisons to measure it on more.
        again: whether it can be measured in a searchable model, in the formats that this has.
        at_target: whether it depends on the target of the problem.
    """

    name: ClassVar[str]
    weights_only: ClassVar[bool] = False
    most_images: ClassVar[int | None] = None
    again: ClassVar[bool] = False
    at_target: ClassVar[bool] = False

    def check(self, space: SearchSpace) -> None:
        """Raises: ConfigError: a space that the score is not for."""
        if self.weights_only and space.activation != "same":
            raise ConfigError(
                f"the score {self.name!r} is of weights only, and nothing would choose the formats of inputs: use a "
                "space with activation='same', or another score"
            )

    def __call__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Tensor]],
        forward: Forward,
        choices: SearchSpace | SearchProblem,
        settings: QuantizerSettings | None = None,
        *,
        combine: Combine | None = None,
        task: Task = IMAGE_CLASSIFICATION,
    ) -> Sensitivity:
        """Measure it. The model is left as it was.

        Args: see `ScorePass`.
        Raises: DataError: no batch, a target without a meaning, a loss or gradient that is not finite, or scores that
            tell no formats apart. ConfigError: a space or predictions that the score is not for. AllocationError: a
            space of another model.
        """
        on = ScorePass(model, batches, forward, choices, settings or QuantizerSettings(), combine, task)
        self.check(on.space)
        start = time.perf_counter()
        scores, images = self.measure(on)
        return self.record(meaningful(scores), images, time.perf_counter() - start)

    @abstractmethod
    def measure(self, on: ScorePass) -> tuple[Tensor, int]:
        """Scores [D, K], float32, lower is better, and the number of images that they are of."""

    def record(self, scores: Tensor, images: int, seconds: float) -> Sensitivity:
        """What `measure` has given in so many seconds."""
        return Sensitivity(scores, images, seconds, method=self.name)


def meaningful(scores: Tensor) -> Tensor:
    """`scores` [D, K]. Raises: DataError: they tell no formats apart, so formats would be chosen from nothing."""
    if not scores.any():
        raise DataError(
            "every sensitivity score is 0: no gradient of the loss reaches the layers. Either the answers are too "
            "sure (a saturated softmax: measure on other images or labels), or the layers don't decide them"
        )
    if scores.shape[1] > 1 and bool((scores == scores[:, :1]).all()):
        raise DataError(
            "the sensitivity scores of all formats are equal in every layer, so they choose nothing: check that the "
            "images differ, and that the layers are not all 0"
        )
    return scores


@contextmanager
def frozen(model: nn.Module, but: Collection[Tensor] = ()) -> Iterator[None]:
    """Evaluation mode, and gradients for the parameters in `but` only; both as before afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {id(parameter) for parameter in but}
    try:
        for parameter in flags:
            parameter.requires_grad_(id(parameter) in kept)
        with evaluation(model):
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
