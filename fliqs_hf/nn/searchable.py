"""Searchable layers: ordinary fp32 parameters, and a number format that can change at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fliqs_hf.allocation import Allocation
from fliqs_hf.errors import AllocationError, ConfigError, FormatError
from fliqs_hf.formats import Format
from fliqs_hf.quant import GridParams, InputQuantizer, WeightQuantizer, format_table
from fliqs_hf.quant.scale import (
    CALIBRATED,
    ActivationGranularity,
    ScaleMethod,
    WeightGranularity,
    check_choice,
)
from fliqs_hf.quant.tokens import Tokens

if TYPE_CHECKING:
    from fliqs_hf.nn.kinds.kind import LayerKind

WEIGHT, ACTIVATION = 0, 1

#: Adam moves every parameter by about the learning rate in a step. A factor has to move by tens of percent in a run in
#: which weights move by hundredths.
CLIP_RATE = 30.0


@dataclass(frozen=True)
class QuantizerSettings:
    """How scales are made; the formats themselves are in an `Allocation`.

    `activation_granularity="static"` is of packed layers only: it takes one number per layer, from
    `fliqs_hf.ptq.calibrate`. "per_token_clipped" does so too, but a searchable model learns it.

    Raises: FormatError: a setting that does not exist.
    """

    weight_granularity: WeightGranularity = "per_channel"
    weight_scale: ScaleMethod = "absmax"
    activation_granularity: ActivationGranularity = "per_token"

    @property
    def clipped(self) -> bool:
        return self.activation_granularity == "per_token_clipped"

    def __post_init__(self) -> None:
        check_choice("weight_granularity", self.weight_granularity, WeightGranularity)
        check_choice("weight_scale", self.weight_scale, ScaleMethod)
        check_choice("activation_granularity", self.activation_granularity, ActivationGranularity)

    @property
    def weights(self) -> WeightQuantizer:
        return WeightQuantizer(self.weight_granularity, self.weight_scale)

    def inputs(self, tokens: Tokens) -> InputQuantizer:
        return InputQuantizer(tokens, self.activation_granularity)

    def require_dynamic(self, learned: bool = False) -> None:
        """Raises: ConfigError: the settings need calibration images, and there are none here.

        Args:
            learned: factors of "per_token_clipped" are parameters.
        """
        if self.activation_granularity in CALIBRATED and not (learned and self.clipped):
            activations = "mse" if self.activation_granularity == "static" else "clipped"
            raise ConfigError(
                f"activation_granularity={self.activation_granularity!r} needs calibration images: call "
                f"fliqs_hf.ptq.calibrate(model, allocation, batches, activations={activations!r}) on the plain model, "
                "or choose 'per_token'"
            )


class FormatSwitch:
    """Chooses the formats of all searchable layers of a model at once.

    The chosen formats are numbers in one small tensor per device that every layer reads, so a change of all of them
    is one gather: no host synchronisation, no work that grows with layers × formats, no recompilation.

    Attributes:
        names: the layers, in the order of the model; the index of a layer in `set`.
        formats: the formats to choose from; the index of a format in `set`.
    """

    def __init__(self, names: Sequence[str], formats: Sequence[Format], settings: QuantizerSettings) -> None:
        if not formats:
            raise FormatError("a searchable model needs at least one format to choose from")
        self.names = tuple(names)
        self.formats = tuple(formats)
        settings.require_dynamic(learned=True)
        self.settings = settings
        self.enabled = True
        self.input_groups: tuple[int | None, ...] = (None,) * len(self.names)  # layers of one group share their input
        self.weights = settings.weights
        self.integer = all(fmt.is_integer for fmt in formats)
        self._own_scales = [fmt.scales_itself for fmt in formats]
        self._rows: list[list[int]] = []  # of formats chosen, on the host; only where some have scales of their own
        self._table = format_table(formats)
        self._chosen = torch.zeros(len(self.names), 2, dtype=torch.long)
        self._exceptions: set[tuple[int, int]] = set()  # (layer, role) that stay in floating point
        self._data: dict[torch.device, tuple[Tensor, Tensor, list[list[GridParams]]]] = {}

    def set(self, weight_index: Tensor, activation_index: Tensor) -> None:
        """Choose formats by index into `formats`.

        Args:
            weight_index, activation_index: [layers], int64, on the model's device (one small copy otherwise). Layers
                of one input group need the same activation index; on the CPU this is checked.
        Raises: AllocationError: they have not.
        """
        if activation_index.device.type == "cpu":
            self._check_groups(activation_index.tolist())
        self._chosen = torch.stack([weight_index, activation_index], dim=1)
        self._exceptions = set()
        self._rows = self._chosen.tolist() if any(self._own_scales) else []
        for device in self._data:
            self._refresh(device)

    def set_allocation(self, allocation: Allocation) -> None:
        """Choose the formats of an allocation; layers that it does not name run in fp32.

        Raises: AllocationError: a layer that is not searchable, a format outside `formats`, or layers that share one
            quantized input but not its format.
        """
        unknown = [name for name in allocation if name not in self.names]
        if unknown:
            raise AllocationError(f"the allocation names {unknown[0]!r}, which is not among the searchable layers")
        chosen = torch.zeros(len(self.names), 2, dtype=torch.long)
        exceptions = {(row, role) for row in range(len(self.names)) for role in (WEIGHT, ACTIVATION)}
        for row, name in enumerate(self.names):
            if name not in allocation:
                continue
            for role, fmt in ((WEIGHT, allocation[name].weight), (ACTIVATION, allocation[name].activation)):
                if fmt is None:
                    continue
                if fmt not in self.formats:
                    raise AllocationError(
                        f"the allocation gives {name!r} the format {fmt}, but this model was made searchable over "
                        f"{', '.join(f.name for f in self.formats)}"
                    )
                chosen[row, role] = self.formats.index(fmt)
                exceptions.discard((row, role))
        shared: dict[int, str] = {}
        for name, group in zip(self.names, self.input_groups, strict=True):
            activation = allocation[name].activation if name in allocation else None
            if group is None or activation is None:
                continue
            other = shared.setdefault(group, name)
            if allocation[other].activation != activation:
                raise AllocationError(
                    f"{other!r} and {name!r} read the same tensor, which is quantized once, but the allocation gives "
                    f"them {allocation[other].activation} and {activation}"
                )
        self.set(chosen[:, WEIGHT], chosen[:, ACTIVATION])
        self._exceptions = exceptions

    def _check_groups(self, indices: Sequence[int]) -> None:
        first: dict[int, int] = {}  # group -> row of its first layer
        for row, group in enumerate(self.input_groups):
            if group is not None and indices[other := first.setdefault(group, row)] != indices[row]:
                raise AllocationError(
                    f"{self.names[other]!r} and {self.names[row]!r} read the same tensor, which is quantized once, "
                    f"but are given {self.formats[indices[other]]} and {self.formats[indices[row]]}"
                )

    def leave_weights(self) -> None:
        """Leave all weights in floating point, until formats are chosen anew."""
        self._exceptions |= {(row, WEIGHT) for row in range(len(self.names))}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the layers in plain fp32 within this context."""
        previous, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = previous

    def quantizes(self, row: int, role: int) -> bool:
        return self.enabled and (row, role) not in self._exceptions

    def format(self, row: int, role: int, device: torch.device) -> Format | GridParams:
        """The chosen format of one layer's weight or activation: as data, or itself where it has scales of its own,
        whose shape depends on it. (A space that has such formats is read back from the device at every choice, and
        compiled anew for each format that a layer meets.)"""
        if any(self._own_scales):
            index = self._rows[row][role] if self._rows else 0
            if self._own_scales[index]:
                return self.formats[index]
        return self.data(row, role, device)

    def data(self, row: int, role: int, device: torch.device) -> GridParams:
        """The chosen format of one layer's weight or activation, as tensors on `device`."""
        self.prepare(device)
        _, active, views = self._data[device]
        if torch.compiler.is_compiling():  # one input of the graph instead of five for each layer and role
            return GridParams(*active[row, role].unbind())
        return views[row][role]

    def prepare(self, device: torch.device) -> None:
        """Make the tensors for layers on `device`, if there are none. What is compiled must find them made: it would
        be compiled again after it had made them."""
        if device in self._data:
            return
        active = torch.empty(len(self.names), 2, self._table.shape[1], device=device)
        views = [[GridParams(*active[i, j].unbind()) for j in (WEIGHT, ACTIVATION)] for i in range(len(self.names))]
        self._data[device] = (self._table.to(device), active, views)
        self._refresh(device)

    def _refresh(self, device: torch.device) -> None:
        table, active, _ = self._data[device]
        torch.index_select(table, 0, self._chosen.flatten().to(device), out=active.view(-1, table.shape[1]))

    def __getstate__(self) -> dict[str, Any]:
        # A copy makes its own tensors: views must never be copied apart from what they view.
        return {**self.__dict__, "_data": list(self._data)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _data={})
        for device in state["_data"]:
            self.prepare(device)


class SharedInput:
    """The quantized input of layers that read one tensor in one format (q, k and v), made once per forward pass."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._key: tuple[Any, ...] = ()
        self._value: Tensor | None = None
        self._left = 0

    def get(self, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """`make()` for the first reader of `x`, the same tensor for the others; released after the last one."""
        if torch.compiler.is_compiling():  # a compiler computes equal expressions once by itself
            return make()
        if x.is_inference():  # has no version, so a change in place would go unnoticed
            return make()
        # The input itself is part of the key, so it cannot be freed and another tensor take its place in memory.
        key = (x, x._version, torch.is_grad_enabled())
        if self._value is None or self._key[0] is not x or self._key[1:] != key[1:]:
            self._key, self._value, self._left = key, make(), self.readers
        value = self._value
        self._left -= 1
        if self._left == 0:
            self._key, self._value = (), None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        memo[id(self)] = copy = SharedInput(self.readers)
        return copy


class SearchableLayer(nn.Module):
    """What the searchable classes of all kinds share. `swap.make_searchable` gives an ordinary layer such a class and
    these attributes.

    Attributes:
        kind: of layer.
        plain: the class that it had before.
        switch, row: who chooses its formats, and its index there.
        input_quantizer: of its tokens.
        shared_input: where layers that read the same tensor meet, or None.
        input_clip: float32 [1], the logarithm of the factor on the absmax scale of each token, over `CLIP_RATE`; only
            where the activation granularity is "per_token_clipped".
    """

    is_fliqs_layer = True
    kind: LayerKind
    weight: Tensor
    bias: Any
    plain: type[nn.Module]
    switch: FormatSwitch
    row: int
    input_quantizer: InputQuantizer
    shared_input: SharedInput | None
    input_clip: nn.Parameter

    def clip_factor(self) -> Tensor:
        """The factor on the absmax scale of each token, float32 [1]."""
        return (self.input_clip.float() * CLIP_RATE).exp()

    def quantized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Input and weight, [out, ...], in the formats that the switch says."""
        switch, weight = self.switch, self.kind.rows(self, self.weight)
        if switch.quantizes(self.row, ACTIVATION):
            fmt, source = switch.format(self.row, ACTIVATION, x.device), x
            quantizer = self.input_quantizer

            def make() -> Tensor:
                if switch.settings.clipped:
                    return quantizer.clipped(source, fmt, self.clip_factor(), switch.integer)
                return quantizer(source, fmt, switch.integer)

            x = make() if self.shared_input is None else self.shared_input.get(x, make)
        if switch.quantizes(self.row, WEIGHT):
            weight = switch.weights(weight, switch.format(self.row, WEIGHT, weight.device), switch.integer)
        return x, weight

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self.quantized(input)
        return self.kind.multiply(self, x, weight, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.switch.prepare(self.weight.device)
        return self
