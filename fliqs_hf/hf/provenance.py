"""How the model of a run folder came about, so that card and report speak of what was done and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from fliqs_hf.runs.finished import FinishedRun


@dataclass(frozen=True)
class Provenance:
    """
    Attributes:
        known: whether there is a record of it at all; without one the others are False.
        trained: the weights were trained for their formats.
        searched: the formats were chosen, not given.
        calibrated: images decided how the weights were rounded.
        uniform: all quantized layers have the same formats.
    """

    known: bool
    trained: bool
    searched: bool
    calibrated: bool
    uniform: bool

    @classmethod
    def of(cls, run: FinishedRun) -> Provenance:
        has = {name: run.has(name) for name in ("search_space.json", "metrics.jsonl", "settings.json")}
        trained = has["metrics.jsonl"] or run.settings.search is not None
        return cls(
            known=any(has.values()),
            trained=trained,
            searched=has["search_space.json"],
            calibrated=not trained and bool(run.settings.arguments.get("calibration")),
            uniform=len(set(run.allocation.values())) == 1,
        )

    @property
    def formats(self) -> str:
        """Where the formats come from."""
        if self.trained:
            return "a search chose the number format of every layer"
        if self.searched:
            return "the number format of every layer was chosen by how much it disturbs the model"
        return "all layers were given the same number formats" if self.uniform else "the number formats were given"

    @property
    def weights(self) -> str:
        """What was done to the weights."""
        if self.trained:
            return "the weights were trained for it"
        if self.calibrated:
            return "calibration images decided how to round the weights, without any training"
        return "the weights were rounded, without calibration or training"

    @property
    def sentence(self) -> str:
        """Both; empty where there is no record."""
        text = f"{self.formats}, and {self.weights}."
        return text[:1].upper() + text[1:] if self.known else ""
