"""What follows once the result of a search is on record, the same however often it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fliqs_hf.cost import LayerInfo
from fliqs_hf.errors import CheckpointError, DependencyError
from fliqs_hf.hf.card import write_card
from fliqs_hf.runs.finished import FinishedRun
from fliqs_hf.runs.folder import RunFolder, cost_lines, layer_table
from fliqs_hf.selection import SearchSpace
from fliqs_hf.tasks import recorded


def complete(run: RunFolder, layers: Sequence[LayerInfo], space: SearchSpace, result: dict[str, Any]) -> str:
    """Write what a finished run has beside its result and its model.

    Returns: what to tell the user. Raises: CheckpointError: the model is lost or damaged. DiskError.
    """
    run.begin(layers, space)
    try:
        allocation = FinishedRun.read(run.path).allocation
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; {run.records / 'results.json'} is of a finished run: restore what it lacks, or remove "
            "results.json, and --resume searches again"
        ) from error
    run.write("allocation.json", allocation.to_dict())
    return f"\n{layer_table(layers, allocation)}\n\n{summary(result)}\nrun folder      {run.path}\n{report(run)}"


def summary(result: dict[str, Any]) -> str:
    """Cost, size and accuracy, before and after."""
    cost, accuracy = result["cost"], result["accuracy"]
    fp32, found = accuracy["fp32"], accuracy["searched"]
    lines = [
        f"bit operations  {cost['fp32_bops'] / 1e9:9.3f} G fp32  -> {cost['bops'] / 1e9:9.3f} G  "
        f"({cost['target_ratio']:.1%} of the target)",
        *cost_lines(cost),
        f"checkpoint      {result['fp32_bytes'] / 1e6:9.3f} MB fp32 -> "
        f"{result['checkpoint_bytes'] / 1e6:9.3f} MB on disk",
        f"{_heading(found)}{_value(fp32):9.2%} fp32    -> {_value(found):9.2%} searched  ({found['n']} images)",
    ]
    lines += [
        f"                {_value(other):9.2%} {name.replace('_', ' ')}, trained for as many steps"
        for name, other in accuracy.items()
        if name.startswith("uniform_")
    ]
    if result["sensitivity_seconds"] is not None:
        spent, step = result["sensitivity_seconds"], result["seconds_per_step"]
        lines.append(f"sensitivity     {spent:9.1f} s, as long as {spent / step:.0f} steps of this search")
    if result["repaired"]:
        lines.insert(
            0,
            f"The policy's arg-max costs {result['argmax_cost_ratio']:.3f} of the target; the integer program over "
            "its log-probabilities chose this allocation instead.\n",
        )
    return "\n".join(lines)


def _value(score: dict[str, Any]) -> float:
    return recorded(score)[1]


def _heading(score: dict[str, Any]) -> str:
    measure, _ = recorded(score)
    return f"{'accuracy' if measure == 'top-1' else measure:<16}"


def report(run: RunFolder) -> str:
    """Write the card and the report. Returns: the line that says where it is, or what is missing to make it."""
    write_card(run.path)  # which needs no library that could be missing
    try:
        from fliqs_hf.report.run_report import write_report
    except DependencyError as error:
        return f"report          {error}, then fliqs-hf report {run.path}"
    return f"report          {write_report(run.path)}"
