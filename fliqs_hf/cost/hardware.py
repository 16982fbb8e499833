"""Which formats a device runs: profiles as data files, one per class of devices, and files of one's own.

A pair of formats (weights, inputs) is *native* where the device multiplies them as they are; *carried* where the
values of both, times a power of two, are exactly values of a native pair: INT4 runs as INT8, at the cost of INT8;
otherwise it is *simulated*.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.checks import is_number
from fliqs_hf.cost.models import bops
from fliqs_hf.cost.shapes import LayerInfo
from fliqs_hf.errors import CheckpointError, ConfigError, FormatError
from fliqs_hf.formats import BlockFormat, Format, code_values, parse
from fliqs_hf.nn.native.codes import int8_shift
from fliqs_hf.nn.native.int8 import largest_exact_weight
from fliqs_hf.wording import percent

_FOLDER = Path(__file__).parent / "profiles"
_KEYS = {
    "title": str, "source": str, "pairs": list, "largest_weight_code": int, "bandwidth_gb_s": (int, float),
    "bandwidth_source": str, "bf16_tflops": (int, float), "bf16_source": str, "fallback": str, "note": str,
}  # fmt: skip
_REQUIRED = ("title", "source", "fallback")
#: What this machine's GPU is called -> its profile. H200 is of the class of the H100.
_GPUS = {
    "A100": "a100",
    "H100": "h100",
    "H200": "h100",
    "B200": "b200",
    "L40S": "l40s",
    "L4": "l40s",
    "MI300X": "mi300x",
}

State = Literal["native", "carried", "simulated"]
_STATES = ("native", "carried", "simulated", "nowhere known")


@dataclass(frozen=True)
class Run:
    """How a device runs a pair of formats, and why, in words; its `rate` is relative to bf16 where it is known.

    Attributes:
        carrier_bits: of the native pair that a carried one runs as.
    """

    state: State
    reason: str
    rate: float | None = None
    carrier_bits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Formats that a device multiplies in any combination; `rate` is relative to bf16 on the same device."""

    weights: tuple[Format, ...]
    inputs: tuple[Format, ...]
    rate: float | None


@dataclass(frozen=True)
class Profile:
    """A class of devices.

    Attributes:
        source: where what it runs is documented.
        largest_weight_code: of a CPU: it sums products of 8-bit integers exactly for weights up to this one.
        bandwidth_gb_s: of its memory, from `bandwidth_source`.
        bf16_tflops: of dense products in bf16, from `bf16_source`; a multiplication and an addition count as two.
        fallback: what becomes of other formats.
    """

    name: str
    title: str
    source: str
    pairs: tuple[Pair, ...]
    fallback: str
    largest_weight_code: int | None = None
    bandwidth_gb_s: float | None = None
    bandwidth_source: str | None = None
    bf16_tflops: float | None = None
    bf16_source: str | None = None
    note: str = ""

    def runs(self, formats: LayerFormats | None) -> Run:
        """How it runs a layer of these formats, None for one in fp32."""
        if formats is None or formats.activation is None:
            return Run("simulated", f"the input is not quantized: {self.fallback}")
        weight, activation = formats.weight, formats.activation
        for pair in self.pairs:
            if weight in pair.weights and activation in pair.inputs:
                return Run("native", f"{weight} × {activation}", pair.rate)
        if self.largest_weight_code is not None and (run := self._as_codes(weight, activation)) is not None:
            return run
        wide = [
            (weights, inputs, pair.rate)
            for pair in self.pairs
            for weights in pair.weights
            for inputs in pair.inputs
            if fits(weight, weights) and fits(activation, inputs)
        ]
        if wide:
            weights, inputs, rate = min(wide, key=lambda pair: pair[0].bits * pair[1].bits)
            bits = (weights.bits, inputs.bits)
            return Run("carried", f"as {weights} × {inputs}, exactly and at their cost", rate, bits)
        return Run("simulated", self.fallback)

    def rate(self, formats: LayerFormats | None) -> float:
        """Of the products of a layer, relative to bf16, which decoded weights run at. Raises: ConfigError: unknown."""
        run = self.runs(formats)
        if run.state == "simulated":
            return 1.0
        if run.rate is None:
            raise ConfigError(
                f"the profile {self.name} has no rate for {run.reason}; add one to a profile of your own"
            )
        return run.rate

    def _as_codes(self, weight: Format, activation: Format) -> Run | None:
        """Of a CPU, by the same arithmetic that chooses the kernels of packed layers."""
        shifts = [int8_shift(fmt) for fmt in (weight, activation)]
        if None in shifts or weight.max_value * 2 ** (shifts[0] or 0) > (self.largest_weight_code or 0):
            return None
        whole = weight.name == activation.name == "int8"
        reason = f"{weight} × {activation} as 8-bit integers, exactly"
        return Run("native", reason) if whole else Run("carried", reason, carrier_bits=(8, 8))


@cache
def fits(narrow: Format, wide: Format) -> bool:
    """Whether every value of `narrow`, times one power of two, is a value of `wide`. Scales absorb the power."""
    if narrow == wide:
        return True
    if isinstance(narrow, BlockFormat) or isinstance(wide, BlockFormat):
        return False  # whose scales are within the sum
    if narrow.bits > min(wide.bits, 8) or not narrow.is_scaled:
        return False
    values = code_values(narrow)
    values = values[values.isfinite()].unique()
    if wide.bits == 16 and not wide.is_scaled:
        return bool((values == values.bfloat16().float()).all())
    if wide.bits > 8:
        return wide.is_integer and narrow.is_integer
    own = set(code_values(wide).tolist())
    largest = round(math.log2(wide.max_value / narrow.smallest))
    least = round(math.log2(wide.smallest / narrow.smallest))
    return any(set((values * 2.0**k).tolist()) <= own for k in range(least, largest + 1))


def profile_names() -> list[str]:
    """Of the profiles that come with the package."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A profile by its name, "auto" for that of this machine, or one of a YAML file.

    Raises: ConfigError: no such profile, or a file that is none; it names the file, the line and the remedy.
    """
    if name == "auto":
        name = detected()
    if name in profile_names():
        return _read(_FOLDER / f"{name}.yaml", name)
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name), Path(name).stem)
    raise ConfigError(
        f"hardware {name!r} does not exist; choose from {', '.join(['auto', *profile_names()])}, or a .yaml file"
    )


def profile_here() -> Profile | None:
    """That of this machine; None where there is none, for what is only said beside a result."""
    try:
        return load_profile("auto")
    except ConfigError:
        return None


def detected() -> str:
    """The profile of this machine. Raises: ConfigError: a device that none describes."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        found = next((profile for part, profile in _GPUS.items() if part in re.split(r"[ -]", device)), None)
        if found is None:
            raise ConfigError(
                f"no profile describes {device!r}; name one with --hardware, or a .yaml file of your own"
            )
        return found
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm-dotprod"
    if largest_exact_weight() == 127:
        return "x86-amx" if torch.cpu._is_amx_tile_supported() else "x86-vnni"
    return "x86-avx2"


def _read(file: Path, name: str) -> Profile:
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the hardware profile {str(file)!r}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or node is None:
        raise ConfigError(f"{file}, line 1: a profile is 'key: value' lines, with {', '.join(_REQUIRED)}")
    names = [key.value for key, _ in node.value]
    lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}

    def refuse(key: str, problem: str) -> ConfigError:
        return ConfigError(f"{file}, line {lines.get(key, 1)}: {problem}")

    for key, value in data.items():
        if key not in _KEYS:
            raise refuse(str(key), f"unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise refuse(key, f"{key} has the value {value!r}, which is of another type")
        if names.count(key) > 1:
            raise refuse(key, f"{key} is there more than once; leave one")
    for key in _REQUIRED:
        if key not in data:
            raise ConfigError(f"{file}, line 1: {key} is missing; add it")
    if data.get("largest_weight_code", 64) not in (64, 127):
        raise refuse("largest_weight_code", "largest_weight_code is 64 or 127")
    for figure, of in (("bandwidth_gb_s", "bandwidth_source"), ("bf16_tflops", "bf16_source")):
        if figure in data and not _is_positive(data[figure]):
            raise refuse(figure, f"{figure}={data[figure]!r} must be a positive number")
        if (figure in data) != (of in data):
            raise refuse(figure, f"{figure} and {of} go together; a figure needs its source")
    try:
        pairs = tuple(_pair(entry) for entry in data.get("pairs", []))
    except (FormatError, ConfigError) as error:
        raise refuse("pairs", str(error)) from error
    if not pairs and "largest_weight_code" not in data:
        raise refuse("pairs", "a device runs some pair: give pairs or largest_weight_code")
    return Profile(**{"name": name, **data, "pairs": pairs})


def _pair(entry: Any) -> Pair:
    if not (isinstance(entry, dict) and {"weights", "inputs"} <= set(entry) <= {"weights", "inputs", "rate"}):
        raise ConfigError(f"pairs: {entry!r} needs weights and inputs, lists of formats, and may have a rate")
    weights, inputs = (entry[key] for key in ("weights", "inputs"))
    if not (isinstance(weights, list) and isinstance(inputs, list) and weights and inputs):
        raise ConfigError(f"pairs: {entry!r}: weights and inputs are lists of formats")
    rate = entry.get("rate")
    if rate is not None and not _is_positive(rate):
        raise ConfigError(f"pairs: rate {rate!r} must be a positive number")
    return Pair(tuple(map(parse, weights)), tuple(map(parse, inputs)), rate)


def _is_positive(value: object) -> bool:
    return is_number(value, 0) and value != 0


@cache
def run_anywhere(formats: LayerFormats) -> bool:
    """Whether some profile of the package runs the pair, as it is or carried."""
    return any(load_profile(name).runs(formats).state != "simulated" for name in profile_names())


def native_share(
    profile: Profile, layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]
) -> dict[str, float]:
    """Parts of the bit operations that are native, carried, simulated, or run on no known hardware; their sum is 1.

    Layers in fp32 count as simulated.
    """
    parts = dict.fromkeys(_STATES, 0.0)
    total = bops(layers, allocation)
    for layer in layers:
        formats = allocation.get(layer.name)
        state: str = profile.runs(formats).state
        if state == "simulated" and formats is not None and not run_anywhere(formats):
            state = "nowhere known"
        own = Allocation({} if formats is None else {layer.name: formats})
        parts[state] += bops([layer], own) / total
    return parts


@dataclass(frozen=True)
class HardwareShare:
    """Where the bit operations of an allocation run, for the records of a run.

    Attributes:
        profile, title: of the hardware. share: as `native_share` gives it.
    """

    profile: str
    title: str
    share: Mapping[str, float]

    @classmethod
    def of(
        cls, profile: Profile, layers: Sequence[LayerInfo], allocation: Mapping[str, LayerFormats]
    ) -> HardwareShare:
        return cls(profile.name, profile.title, native_share(profile, layers, allocation))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HardwareShare:
        """Raises: CheckpointError: entries that are none."""
        try:
            share = {state: float(data["share"][state]) for state in _STATES}
            return cls(str(data["profile"]), str(data["title"]), share)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"results.json: hardware: {data!r:.100} is no share of a profile ({error!r})"
            ) from error

    def __str__(self) -> str:
        native, carried, simulated, nowhere = (percent(self.share[state]) for state in _STATES)
        return (
            f"Of the bit operations, {native} are in formats that {self.title} runs natively, {carried} in formats "
            f"that it runs exactly as wider ones and at their cost, {simulated} in simulation only there, and "
            f"{nowhere} in formats that run on no known hardware."
        )


def restricted(formats: Sequence[Format], profile: Profile) -> list[Format]:
    """Those that the device runs for weights and inputs alike, native or carried.

    Raises: ConfigError: none of them.
    """
    both = [fmt for fmt in formats if not fmt.for_inputs_only]
    kept = [fmt for fmt in both if profile.runs(LayerFormats(fmt, fmt)).state != "simulated"]
    if not kept:
        raise ConfigError(
            f"{profile.title} runs none of {', '.join(fmt.name for fmt in formats)}: choose another search space, "
            "or leave hardware out"
        )
    return kept
