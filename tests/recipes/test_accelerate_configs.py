"""The accelerate configurations are ones that accelerate understands."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize(("name", "machines", "processes"), [("gpu-1", 1, 1), ("gpu-8", 1, 8), ("gpu-2x8", 2, 16)])
def test_accelerate_reads_it(name: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "bf16"
    assert str(config.distributed_type.value) == ("NO" if processes == 1 else "MULTI_GPU")
