"""Means of metrics between two lines of the log, which an interruption does not change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PREFIX = "window."


class Window:
    """Sums of metrics on the device since `clear`. Reading is the only point that waits for it."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.length = 0  # steps
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}  # a search has fewer metrics once its formats are settled
        self._everyone: Tensor | None = None  # as `read` has seen it: [processes, metrics]

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in the metrics of a step."""
        for key, value in values.items():
            self._sums[key] = self._sums.get(key, 0) + value.detach().to(self.accelerator.device).float()
            self._counts[key] = self._counts.get(key, 0) + 1
        self.length += 1

    def read(self, interrupted: bool) -> tuple[dict[str, float], bool]:
        """Means over steps and processes, and whether any process was interrupted. All processes call it together."""
        mine = torch.stack([*self._sums.values(), torch.full((), float(interrupted), device=self.accelerator.device)])
        everyone: Tensor = self.accelerator.gather(mine[None]).cpu()
        *sums, stops = everyone.sum(0).tolist()
        self._everyone = everyone[:, :-1]
        processes = len(everyone)
        return {key: total / (self._counts[key] * processes) for key, total in zip(self._sums, sums, strict=True)}, (
            stops > 0
        )

    def clear(self) -> None:
        self.length, self._sums, self._counts, self._everyone = 0, {}, {}, None

    def state_dict(self) -> dict[str, Tensor]:
        """As last read; empty after `clear`. Per metric, in their order: each process's sum, then the steps in it."""
        if self._everyone is None:
            return {}
        return {
            f"{_PREFIX}{index:03d}.{self.length}.{key}": torch.tensor(
                [*self._everyone[:, index].tolist(), self._counts[key]], dtype=torch.float64
            )
            for index, key in enumerate(self._sums)
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on in the same bits; other tensors in `state` are ignored."""
        self.clear()
        for name in sorted(name for name in state if name.startswith(_PREFIX)):
            _, _, length, key = name.split(".", 3)
            self.length = int(length)
            self._sums[key] = state[name][self.accelerator.process_index].float().to(self.accelerator.device)
            self._counts[key] = int(state[name][-1])
