"""The one-shot search as the training loop sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from fliqs_hf.allocation import Allocation
from fliqs_hf.files import append_text
from fliqs_hf.nn import FormatSwitch
from fliqs_hf.oneshot.search import OneShotSearch
from fliqs_hf.records import PolicyStep


class SearchHook:
    """Sets the formats that the search samples, hands it the qualities, and records the policy.

    Implements `training.StepHook`.
    """

    def __init__(self, search: OneShotSearch, switch: FormatSwitch, history: Path | None = None) -> None:
        """
        Args:
            switch: over the layers and formats of the search's space, in the same order.
            history: `policy.jsonl`, appended to.
        Raises: ConfigError: a switch over other layers or formats.
        """
        search.problem.space.check_switch(switch)
        self.search, self.switch, self.history = search, switch, history

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        def setter(formats: tuple[Tensor, Tensor]) -> Callable[[], None]:
            return lambda: self.switch.set(*formats)

        return [setter(formats) for formats in self.search.begin_step(step)]

    def end_step(self, step: int, quality: Tensor) -> dict[str, Tensor]:
        self.search.end_step(step, quality)
        return self.search.metrics() if self.search.phase(step) != "final" else {}

    def settled(self, step: int) -> bool:
        return self.search.phase(step) == "final"

    def log(self, step: int) -> None:
        if self.history is None or self.search.phase(step - 1) == "final":
            return
        probabilities = self.search.probabilities().cpu().tolist()
        decisions = self.search.problem.space.decisions
        rounded = {d.name: [round(v, 5) for v in p] for d, p in zip(decisions, probabilities, strict=True)}
        append_text(self.history, json.dumps(PolicyStep(step=step, probabilities=rounded).to_dict()) + "\n")

    def state_dict(self) -> dict[str, Tensor]:
        return self.search.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.search.load_state_dict(state)


class FixedFormats:
    """Quantization-aware training in one allocation. Implements `training.StepHook`."""

    def __init__(self, switch: FormatSwitch, allocation: Allocation) -> None:
        switch.set_allocation(allocation)

    def begin_step(self, step: int) -> list[Callable[[], None]]:
        return [lambda: None]

    def end_step(self, step: int, quality: Tensor) -> dict[str, Tensor]:
        return {}

    def settled(self, step: int) -> bool:
        return True

    def log(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
