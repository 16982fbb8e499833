"""The accelerate configurations are ones that accelerate understands."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.mark.parametrize(
    ("name", "machines", "processes", "kind"),
    [
        ("gpu-1", 1, 1, "NO"),
        ("gpu-8", 1, 8, "MULTI_GPU"),
        ("gpu-2x8", 2, 16, "MULTI_GPU"),
        ("deepspeed-8", 1, 8, "DEEPSPEED"),
    ],
)
def test_accelerate_reads_it(name: str, machines: int, processes: int, kind: str) -> None:
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.mixed_precision == "bf16"
    assert str(config.distributed_type.value) == kind


def test_deepspeeds_configuration_has_nothing_that_training_refuses() -> None:
    """Batch size, accumulation and clipping come from the recipe's arguments."""
    config = load_config_from_file(str(CONFIGS / "deepspeed-8.yaml")).deepspeed_config
    assert config["zero_stage"] == 2 and not config["zero3_init_flag"]
    assert not {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"} & config.keys()
    assert {config["offload_optimizer_device"], config["offload_param_device"]} == {"none"}
