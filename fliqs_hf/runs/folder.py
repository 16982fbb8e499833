"""The run folder: the model at its top, and everything about its search in `fliqs/`, for people and later commands."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from fliqs_hf import checksums
from fliqs_hf.allocation import Allocation
from fliqs_hf.cost import LayerInfo, bops, registered, weight_bytes
from fliqs_hf.cost.models import BOPS, WEIGHT_BYTES
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.files import append_text, replacing
from fliqs_hf.json_file import parse_object, read_bytes, read_json, read_text
from fliqs_hf.oneshot.config import SearchConfig
from fliqs_hf.records import PolicyStep, Record, RunSettings, SensitivityScores
from fliqs_hf.runs.files import RUN, RunFiles
from fliqs_hf.selection.scores.score import Sensitivity
from fliqs_hf.selection.space import SearchSpace
from fliqs_hf.tasks import recorded

#: Settings that may change between an interruption and `--resume`: they do not decide the result.
FREE = (
    "output_dir", "overwrite_output_dir", "resume", "push_to_hub", "hub_model_id", "hub_private_repo", "report_to",
    "metrics", "per_device_eval_batch_size", "cache_dir", "run_name",
)  # fmt: skip
R = TypeVar("R", bound=Record)
#: What a resumed run goes on from.
RESUMED = ("state", "fp32-state", "fp32", "results.json")
PACKAGES = ("fliqs-hf", "torch", "transformers", "accelerate", "datasets", "safetensors", "scipy")


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the hardware."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class RunFolder:
    """Paths and files of one run. Nothing is made before something is written."""

    def __init__(self, path: str | Path) -> None:
        """Raises: ConfigError: an empty name, which would be the working directory, or one that no folder can have."""
        if not str(path).strip() or "\0" in str(path):
            raise ConfigError(f"the output folder {str(path)!r} has no usable name: give one, such as runs/pilot")
        self.path = Path(path)
        self.files = RunFiles(self.path)
        self.records = self.path / RUN
        self.state = self.records / "state"
        self.policy = self.records / PolicyStep.name
        self.metrics = self.records / "metrics.jsonl"

    def claim(self, *names: str) -> None:
        """List records that are about to be written: files, and folders of states ("state/"). See `RunFiles.claim`."""
        self.files.claim(*(f"{RUN}/{name}" for name in names))

    def discard(self, name: str) -> None:
        """Remove a record. See `RunFiles.discard`."""
        self.files.discard(f"{RUN}/{name}")

    def write(self, name: str, data: Any) -> None:
        """A record as JSON: complete, or as it was. Raises: DiskError. ConfigError: what is there is not ours."""
        self.files.write(f"{RUN}/{name}", json.dumps(data, indent=2, default=str) + "\n")

    def read(self, name: str) -> Any:
        """Raises: CheckpointError: no readable record."""
        return read_json(self.records / name)

    def write_record(self, record: Record, sealed: bool = False) -> None:
        """Its own file. `sealed`: with a checksum, for a record that a resumed run believes. See `write`."""
        data = record.to_dict()
        self.write(record.name, checksums.sealed(data) if sealed else data)

    def write_result(self, name: str, result: dict[str, Any]) -> None:
        """A record that a resumed run believes: with a checksum. Raises: DiskError."""
        self.write(name, checksums.sealed(result))

    def read_record(self, record: type[R]) -> R | None:
        """What `write_record` has sealed; None where there is nothing. Raises: CheckpointError: it is damaged."""
        stored = self.read_result(record.name)
        return None if stored is None else record.of(stored, self.records / record.name)

    def read_result(self, name: str) -> dict[str, Any] | None:
        """What `write_result` has written; None where there is nothing. Raises: CheckpointError: it is damaged."""
        if not (self.records / name).exists():
            return None
        try:
            return checksums.read_sealed(self.records / name)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; remove it, and --resume makes what it was the result of again") from error

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A folder to fill, which becomes the folder `name` of the records when it is complete. See `files.replacing`.

        Raises: DiskError. ConfigError: something in the folder that is there is not ours.
        """
        entry = f"{RUN}/{name}"
        self.files.check(entry)
        with replacing(self.path / entry) as draft:
            yield draft
            self.files.check(entry)
            inside = (f"{entry}/{file.relative_to(draft).as_posix()}" for file in draft.rglob("*") if file.is_file())
            self.files.add(inside)

    def model_bytes(self) -> int:
        """Of the weight files of the model, headers included."""
        weights = (name for name in self.files.listed() if name.endswith(".safetensors") and "/" not in name)
        return sum((self.path / name).stat().st_size for name in weights)

    def check(self, settings: dict[str, Any], config: SearchConfig) -> None:
        """Refuse to resume a run of other settings, or of a version with other defaults.

        Raises: CheckpointError: it names the first setting that differs, or says that they are not on record.
        """
        file = self.records / RunSettings.name
        if not file.exists() and not any((self.records / name).exists() for name in RESUMED):
            return
        try:
            stored = RunSettings.read(self.records)
            if stored is None:
                raise CheckpointError(f"{file} is missing")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}: whether this is the same run cannot be told; restore it, or give --overwrite_output_dir "
                "instead of --resume to start again"
            ) from error
        for key, value in {**settings, **asdict(config)}.items():
            known = stored.arguments if key in settings else stored.search or {}
            if key not in FREE and known.get(key) != value:
                raise CheckpointError(
                    f"{self.path} was started with {key}={known.get(key)!r}, not {value!r}: "
                    "resume with the same settings, or start in another output_dir"
                )

    def configure(self, settings: dict[str, Any], config: SearchConfig | None = None) -> None:
        """Record what the run was told to do."""
        program = [Path(sys.executable).name] if sys.argv[0].endswith(".py") else []
        command = shlex.join([*program, *sys.argv])
        search = None if config is None else asdict(config)
        self.write_record(RunSettings(arguments=settings, search=search, command=command, versions=versions()))

    def begin(
        self,
        layers: Sequence[LayerInfo],
        space: SearchSpace | None = None,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        """Record what is known before the search, if formats are searched at all."""
        self.write("layers.json", [asdict(layer) for layer in layers])
        if space is not None:
            self.write("search_space.json", space.to_dict())
        if space is not None and sensitivity is not None:
            rows = zip(space.decisions, sensitivity.decision_scores.tolist(), strict=True)
            scores = {decision.name: [float(f"{value:.9g}") for value in row] for decision, row in rows}  # exact
            record = SensitivityScores(
                method=sensitivity.method, images=sensitivity.images, passes=sensitivity.passes,
                seconds=sensitivity.seconds, scores=scores,
            )  # fmt: skip
            self.write_record(record, sealed=True)

    def sensitivity(self, space: SearchSpace) -> Sensitivity | None:
        """The scores that `begin` has recorded, bit for bit.

        Returns: None where there are none of this space, or they are damaged: they can be measured again.
        """
        try:
            file = self.records / SensitivityScores.name
            stored = SensitivityScores.of(checksums.read_sealed(file), file)
            scores = torch.tensor([stored.scores[decision.name] for decision in space.decisions])
            found = Sensitivity(scores, stored.images, stored.seconds, stored.passes, stored.method)
        except (CheckpointError, ValueError, KeyError):
            return None
        return found if scores.shape == (len(space.decisions), len(space.formats)) else None

    def append(self, entry: dict[str, Any]) -> None:
        self.claim(self.metrics.name)
        append_text(self.metrics, json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop recorded steps beyond `step`, which a resumed run will record again, and a last line that broke off.

        Raises: CheckpointError: another line is damaged.
        """
        for file in (self.metrics, self.policy):
            if file.exists():
                *lines, _ = read_bytes(file).split(b"\n")  # after the last newline there is nothing, or a part
                kept = [line + b"\n" for line in lines if _step(line, file) <= step]
                with replacing(file) as draft:
                    draft.write_bytes(b"".join(kept))

    def seconds(self) -> float:
        """Of training, as its last line of metrics says. Raises: CheckpointError: there is none."""
        try:
            return float(parse_object(read_text(self.metrics).splitlines()[-1], self.metrics)["seconds"])
        except (CheckpointError, ValueError, KeyError, IndexError, TypeError) as error:
            raise CheckpointError(f"{self.metrics} does not say how long the training took: {error}") from error


def _step(line: bytes, file: Path) -> int:
    """Of a recorded line."""
    try:
        return int(parse_object(line, file)["step"])
    except (CheckpointError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{file} is damaged: {error}; remove the line {line[:60]!r} to go on") from error


def cost_summary(layers: Sequence[LayerInfo], allocation: Allocation, other_bytes: int) -> dict[str, float]:
    """Costs of an allocation beside those of fp32. Bytes include everything in the checkpoint but its header."""
    summary: dict[str, float] = {
        "bops": bops(layers, allocation),
        "fp32_bops": bops(layers, {}),
        "bytes": weight_bytes(layers, allocation, other_bytes=other_bytes),
        "fp32_bytes": weight_bytes(layers, {}, other_bytes=other_bytes),
        "macs": sum(layer.macs for layer in layers),
    }
    for cost in registered():
        if cost not in (BOPS, WEIGHT_BYTES):
            beside = other_bytes if cost.of_file else 0
            own = {cost.name: cost.known(layers, allocation), f"fp32_{cost.name}": cost.known(layers, {})}
            summary |= {name: value + beside for name, value in own.items() if value is not None}
    return summary


def cost_lines(cost: Mapping[str, float]) -> list[str]:
    """What `cost_summary` has beside bit operations and bytes, as text."""
    return [
        f"{one.name:<16}{one.shown(cost.get(f'fp32_{one.name}'))} fp32  -> {one.show(cost[one.name])}  ({one.unit})"
        for one in registered()
        if one not in (BOPS, WEIGHT_BYTES) and one.name in cost
    ]


def layer_table(layers: Sequence[LayerInfo], allocation: Allocation) -> str:
    """Layer, MACs, weight format, activation format and bits, as text."""
    rows = [("layer", "MACs", "weight", "activation", "bits")]
    for layer in layers:
        formats = allocation.get(layer.name)
        if formats is None:
            rows.append((layer.name, f"{layer.macs:,}", "fp32", "fp32", "32 × 32"))
            continue
        activation = formats.activation
        bits = f"{formats.weight.effective_bits:g} × {activation.effective_bits if activation else 32:g}"
        rows.append(
            (layer.name, f"{layer.macs:,}", formats.weight.name, activation.name if activation else "fp32", bits)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    right = (False, True, False, False, True)
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_front(folder: RunFolder, results: Sequence[dict[str, Any]], fp32: Any) -> str:
    """`front.csv` and `front.png` of several targets. Args: fp32: its `Score`. Returns: the table as text."""
    import csv
    import io

    rows = [
        {
            "target": " ".join(
                f"{key} {value:g}" for key, value in result["target"].items() if key not in ("cost", "cap")
            ),
            "gbops": round(result["cost"]["bops"] / 1e9, 4),
            "megabytes": round(result["checkpoint_bytes"] / 1e6, 4),
            fp32.key: round(recorded(result["accuracy"]["searched"])[1], 5),
        }
        for result in results
    ]
    writer = csv.DictWriter(text := io.StringIO(), rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.files.write(f"{RUN}/front.csv", text.getvalue())
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        pass
    else:
        figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
        points = sorted((row["gbops"], 100 * row[fp32.key]) for row in rows)
        axes.plot(*zip(*points, strict=True), "o-", label="searched")
        axes.axhline(100 * fp32.value, color="0.5", linestyle="--", label="fp32")
        axes.set(xlabel="bit operations per image, G", ylabel=f"{fp32.measure}, %")
        axes.legend()
        folder.claim("front.png")
        with replacing(folder.records / "front.png") as draft:
            figure.savefig(draft, dpi=150)
        pyplot.close(figure)
    lines = [f"{'target':<16}{'GBOPs':>10}{'MB':>10}{fp32.measure:>10}"]
    lines += [f"{r['target']:<16}{r['gbops']:>10.3f}{r['megabytes']:>10.3f}{r[fp32.key]:>10.2%}" for r in rows]
    return "\n".join(lines)
