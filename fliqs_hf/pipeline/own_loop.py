"""The search in somebody's own training loop: it chooses the formats of every step and hands out the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fliqs_hf.allocation import Allocation
from fliqs_hf.checks import is_whole
from fliqs_hf.cost import LayerInfo, Target, trace_layers
from fliqs_hf.cost.choices import choices
from fliqs_hf.errors import ConfigError
from fliqs_hf.formats import Format
from fliqs_hf.hf import FLIQSConfig, quantize
from fliqs_hf.hf.quantizer import refuse_packed, require_transformers
from fliqs_hf.nn import QuantizerSettings, make_searchable, quantizable_layers
from fliqs_hf.nn.finite import check_finite
from fliqs_hf.oneshot import OneShotSearch, SearchConfig
from fliqs_hf.oneshot.hook import SearchHook
from fliqs_hf.pipeline.costs import search_problem
from fliqs_hf.selection import FormatScore, SearchProblem, SearchSpace, Sensitivity, find_score
from fliqs_hf.selection.space import ActivationMode
from fliqs_hf.tasks import IMAGE_CLASSIFICATION, Task, find_task

#: Images at a time, at most, as the recipe measures sensitivities.
PRIOR_BATCH = 32


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with.

    Attributes:
        allocation: the formats of every layer.
        model: trained for them; packed, or searchable until `quantize`.
        cost, target_cost: in the unit of the target (BOPs, or bytes of the whole file).
        repaired: whether the integer program replaced the policy's own choice, to meet the target.
        layers: all that were traced, those that stay in fp32 included.
        activation_granularity: of the input scales.
        metrics: "accuracy" of the fp32 model and of the packed one and "cost", as in results.json; empty after a loop
            of one's own, which evaluates by itself.
        run: the run folder, if one was kept.
    """

    allocation: Allocation
    model: Any
    cost: float
    target_cost: float
    repaired: bool
    layers: tuple[LayerInfo, ...]
    activation_granularity: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None

    def quantize(self) -> Any:
        """Pack the model, in place. Returns: the model, for `save_pretrained`; the same again when called again."""
        if getattr(self.model, "hf_quantizer", None) is None:
            config = FLIQSConfig(allocation=self.allocation, activation_granularity=self.activation_granularity)
            quantize(self.model, config)
        return self.model

    def save_pretrained(self, folder: str | Path) -> None:
        """Pack the model and save it."""
        self.quantize().save_pretrained(folder)


class Search:
    """One search, step by step.

        search = Search(model, Target.of(target_bits=4), steps=1000, images=loader)
        for batch in loader:
            loss = search.step(batch)
            loss.backward(), optimizer.step(), optimizer.zero_grad()
        search.finish().save_pretrained("my-vit-4bit")

    The parameters of the model stay the same objects, so the optimizer may be made before or after (after, with
    `per_token_clipped`, which adds some). One process; the recipe searches on several.
    """

    def __init__(
        self,
        model: Any,
        target: Target,
        *,
        steps: int,
        images: Iterable[Any] | None = None,
        config: SearchConfig | None = None,
        search_space: str | Sequence[str | Format] | None = None,
        hardware: str | None = None,
        activation: ActivationMode | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        tie: Sequence[str] = (),
        require: Mapping[str, Sequence[str | Format]] | None = None,
        min_bits: Mapping[str, float] | None = None,
        activation_granularity: str = "per_token",
        seed: int = 0,
        task: str | Task = IMAGE_CLASSIFICATION,
    ) -> None:
        """Measure how sensitive the loss is to every format, and make `model` searchable, in place.

        Args:
            model: an fp32 model of Transformers for the task, on its device.
            steps: optimizer steps of the whole run; formats are searched in the first tenth (`explore_fraction`), and
                the rest trains the weights for those that were found.
            images: batches as for `step`, which can be gone through more than once, such as a DataLoader; only the
                first `config.prior_images` images of it are used, to measure sensitivities. Not needed with
                `SearchConfig(prior="none")`.
            search_space, hardware, activation: see `cost.choices`; by default formats that this machine runs.
            tie, require, min_bits: see `SearchSpace`.
            task: what the output and the labels mean: an object, or the name of a registered one.
        Raises: ConfigError: settings or a model that cannot work. TargetError: out of reach. DataError: no images, or
            labels without a meaning. The model is as it was then.
        """
        require_transformers(model)
        refuse_packed(model)
        self.task = find_task(task) if isinstance(task, str) else task
        self.task.check(model.config)
        check_finite(model)
        self.config = config or SearchConfig()
        if not is_whole(steps, 1):
            raise ConfigError(f"steps={steps!r} must be a whole number of at least 1")
        self.settings = QuantizerSettings(activation_granularity=activation_granularity)  # type: ignore[arg-type]
        self.settings.require_dynamic(learned=True)
        chosen = choices(search_space, hardware, activation)
        names = quantizable_layers(model, modules_to_not_convert)
        self.model, self.layers, self.steps_done = model, trace_layers(model), 0
        searched = [layer for layer in self.layers if layer.name in names]
        space = SearchSpace(searched, chosen.formats, chosen.activation, tie, require=require, min_bits=min_bits)
        problem = search_problem(model, self.layers, space, target, self.settings)
        self._search = OneShotSearch(problem, self.config, steps, seed=seed, device=model.device)
        if self.config.prior != "none":
            self._search.start_from(self._scores(images, problem).decision_scores)
        groups = {layer.name: layer.input_group for layer in space.layers}
        switch = make_searchable(model, space.formats, names=list(groups), input_groups=groups, settings=self.settings)
        self._hook = SearchHook(self._search, switch)

    @property
    def searching(self) -> bool:
        """Whether the next step still samples formats; afterwards they are those of `finish`."""
        return self._search.phase(self.steps_done) != "final"

    def step(self, batch: Any) -> Tensor:
        """The loss of a batch in the formats of this step, from which the search learns too.

        Args:
            batch: `{"pixel_values": [batch, 3, height, width], "labels": int64 [batch]}`, or the pair of both.
        Returns: mean loss, float32 []: call `backward` on it before the next step.
        Raises: ConfigError: no such batch. DataError: on a CPU, a target without a meaning.
        """
        images, labels = _pair(batch, self.model.device)
        passes = self._hook.begin_step(self.steps_done)
        qualities = []
        for set_formats in passes[:0:-1]:  # those that are only compared; the last to be set is that which trains
            set_formats()
            with torch.no_grad():
                qualities.append(self._quality(*self._loss(images, labels), labels))
        passes[0]()
        loss, prediction = self._loss(images, labels)
        qualities.append(self._quality(loss, prediction, labels))
        self._hook.end_step(self.steps_done, torch.stack(qualities[::-1]))
        self.steps_done += 1
        return loss

    def finish(self) -> SearchResult:
        """The allocation, derived from what the policy has learned, and the model as it is trained by now."""
        final = self._search.finalize()
        self._hook.switch.set_allocation(final.allocation)
        return SearchResult(
            allocation=final.allocation,
            model=self.model,
            cost=final.cost,
            target_cost=self._search.problem.target_cost,
            repaired=final.repaired,
            layers=self.layers,
            activation_granularity=self.settings.activation_granularity,
        )

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        prediction = self.task.prediction(self.model(images)).float()
        if labels.device.type == "cpu":  # elsewhere a look at every batch would wait for the device
            with torch.no_grad():
                self.task.losses()(prediction, labels)  # which refuses what means nothing
        return self.task.loss(prediction, labels), prediction

    def _quality(self, loss: Tensor, prediction: Tensor, labels: Tensor) -> Tensor:
        measured = -loss if self.config.quality == "loss" else self.task.quality(prediction, labels)
        return measured.detach()

    def _scores(self, images: Iterable[Any] | None, problem: SearchProblem) -> Sensitivity:
        if images is None:
            raise ConfigError(
                "the search starts from sensitivities: give images=, the DataLoader of the training, or "
                "config=SearchConfig(prior='none'), which needs far more steps"
            )
        if iter(images) is images:
            raise ConfigError("images= can be gone through once only: give what it is made from, such as a DataLoader")

        def measured(score: FormatScore) -> Sensitivity:
            forward = lambda batch: self.task.prediction(self.model(batch))  # noqa: E731
            return score(self.model, self._prior(images), forward, problem, self.settings, task=self.task)

        first = measured(find_score(self.config.prior))
        return first if self.config.prior_passes == 1 else measured(self.config.second_look(first))

    def _prior(self, images: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `prior_images` of them, or all if there are fewer."""
        left = self.config.prior_images
        with tqdm(total=left, desc="sensitivity", unit="image") as bar:
            for batch in images:
                pixels, labels = _pair(batch, self.model.device)
                for start in range(0, min(len(labels), left), PRIOR_BATCH):
                    part = slice(start, min(start + PRIOR_BATCH, left, len(labels)))
                    yield pixels[part], labels[part]
                    bar.update(len(labels[part]))
                left -= min(len(labels), left)
                if not left:
                    return


def _pair(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Raises: ConfigError: not pixel values and labels."""
    if isinstance(batch, Mapping) and {"pixel_values", "labels"} <= batch.keys():
        batch = batch["pixel_values"], batch["labels"]
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
    if not pair or batch[0].ndim != 4 or batch[1].shape[:1] != batch[0].shape[:1]:
        raise ConfigError(
            "a batch is {'pixel_values': [batch, channels, height, width], 'labels': [batch, ...]}, or the "
            f"pair of both, not {type(batch).__name__}"
            + (f" with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "")
        )
    images, labels = batch
    return images.to(device, non_blocking=True), labels.to(
        device, None if labels.is_floating_point() else torch.int64, non_blocking=True
    )
