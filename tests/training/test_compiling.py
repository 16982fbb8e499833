"""Compiled training: the weights of eager training where the backend keeps the bits, and what happens without one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters

from fliqs_hf.cost import trace_layers
from fliqs_hf.errors import CheckpointError, ConfigError
from fliqs_hf.nn import FormatSwitch, make_searchable
from fliqs_hf.pipeline.checks import train_config
from fliqs_hf.training import train
from fliqs_hf.training.arguments import parse
from fliqs_hf.training.compiling import can_compile
from tests.helpers.models import tiny
from tests.training.test_loop import Blobs, config, same, weights


class Formats:
    """Other formats at every step, and two passes, of which the second has no gradient. Stops where it is told."""

    def __init__(self, switch: FormatSwitch, stop: int | None = None) -> None:
        self.switch, self.stop = switch, stop

    def begin_step(self, step: int) -> Any:
        if step == self.stop:
            raise KeyboardInterrupt
        rows = len(self.switch.names)
        return [lambda i=i: self.switch.set(*[torch.full((rows,), (step + i) % 3)] * 2) for i in range(2)]

    def end_step(self, step: int, quality: torch.Tensor) -> dict[str, torch.Tensor]:
        self.graphs = counters["stats"]["unique_graphs"]
        return {}

    def log(self, step: int) -> None: ...

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...


def trained(
    folder: Path | None = None, stop: int | None = None, resume: bool = False, graphs: int = 0, **settings: Any
) -> Any:
    """A model that is trained for six steps, in which so many graphs are compiled."""
    torch.compiler.reset()  # as in a new process
    counters.clear()
    model = tiny("vit")
    groups = {layer.name: layer.input_group for layer in trace_layers(model)}
    hook = Formats(make_searchable(model, ["int4", "e2m1", "e4m3"], names=list(groups), input_groups=groups), stop)
    model = train(
        model, Blobs(40), config(max_steps=6, save_steps=2, **settings), Accelerator(cpu=True), hook=hook,  # type: ignore[arg-type]
        state_folder=folder, resume=resume,
    )  # fmt: skip
    assert hook.graphs == graphs
    return model


@pytest.mark.slow
def test_compiled_training_ends_in_the_weights_of_eager_training_also_when_resumed(tmp_path: Path) -> None:
    assert can_compile("aot_eager", "cpu")  # now, as it makes a graph of its own
    wanted = weights(trained())
    model = trained(graphs=2, compile_backend="aot_eager")
    assert type(model) is type(tiny("vit"))
    assert same(wanted, weights(model))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path, stop=3, compile_backend="aot_eager")
    with pytest.raises(CheckpointError, match="compile_backend"):
        trained(tmp_path, resume=True)
    assert same(wanted, weights(trained(tmp_path, resume=True, graphs=2, compile_backend="aot_eager")))


def test_without_what_a_backend_needs_training_says_so_once_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    can_compile.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # tvm is not installed
            model = trained(compile_backend="tvm")
    assert len([r for r in caplog.records if "torch_compile: the backend tvm does not work" in r.getMessage()]) == 1
    assert same(weights(trained()), weights(model))


def test_without_a_compiler_the_default_backend_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    can_compile.cache_clear()
    torch.compiler.reset()
    without = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(without), caplog.at_level(logging.WARNING):
        assert not can_compile("inductor", "cpu")
    assert "the backend inductor does not work here for cpu" in caplog.text and "g++" in caplog.text
    can_compile.cache_clear()
    torch.compiler.reset()


def test_a_backend_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch_compile_backend='fast' does not exist; choose from .*inductor"):
        config(compile_backend="fast")


@pytest.mark.parametrize(
    ("arguments", "backend"),
    [
        ([], None),
        (["--torch_compile"], "inductor"),
        (["--torch_compile_backend", "aot_eager"], "aot_eager"),
    ],
)
def test_arguments_of_the_recipe(arguments: list[str], backend: str | None) -> None:
    args = parse(["--dataset_name", "digits", "--model_type", "vit", *arguments])[2]
    assert train_config(args, 10, 1e-3, "loss").compile_backend == backend
