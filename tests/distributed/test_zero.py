"""DeepSpeed's ZeRO in two gloo processes: the weights of DDP, one result, a crash that leaves no trace, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from tests.distributed.test_two_processes import launch
from tests.helpers.models import tiny

pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

#: No GPU for the processes even where there is one: two cannot share it.
CPU = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `zero_worker` has written."""
    path = tmp_path_factory.mktemp("zero")
    launch(path, worker="zero_worker", more=CPU)
    return path


def of_all_ranks(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a search, which must be the same on both ranks."""
    first, second = (load_file(folder / f"{name}-rank-{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    return first


def weights(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """All in one vector."""
    return torch.cat([tensor.flatten() for key, tensor in sorted(tensors.items()) if key.startswith("model.")])


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a["logits"] - b["logits"]).abs().max()), float((weights(a) - weights(b)).abs().max()))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_search_is_that_of_ddp(folder: Path, stage: int) -> None:
    """Without clipping and accumulation the arithmetic is DDP's: means of two gradients, and Adam's per element.

    Adam runs over slices of other lengths, whose last elements a CPU may round otherwise: hence not the same bits.
    """
    ddp, zero = of_all_ranks(folder, "unclipped-None"), of_all_ranks(folder, f"unclipped-{stage}")
    assert torch.equal(zero["choice"], ddp["choice"])
    assert distance(zero, ddp) <= 1e-6


def test_clipping_and_accumulation_are_those_of_ddp(folder: Path) -> None:
    """The norm and the micro-batches are summed in another order. DDP without clipping is 6e-3 away from DDP with."""
    ddp, zero = of_all_ranks(folder, "usual-None-no"), of_all_ranks(folder, "usual-3-no")
    assert torch.equal(zero["choice"], ddp["choice"])
    assert distance(zero, ddp) <= 1e-4


def test_bf16_trains_as_float32_does(folder: Path) -> None:
    """Weights move in about the same direction (measured: a cosine of 0.98), which they would not by chance (0)."""
    start = weights({f"model.{name}": tensor for name, tensor in tiny("vit").state_dict().items()})
    bf16, ddp = (weights(of_all_ranks(folder, name)) for name in ("usual-2-bf16", "usual-None-no"))
    assert torch.cosine_similarity(bf16 - start, ddp - start, dim=0) > 0.9


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_keeps_the_digits_of_float32_weights(folder: Path, stage: int) -> None:
    """After a step of no length the weights are what they were, not rounded to bfloat16."""
    kept = of_all_ranks(folder, f"still-{stage}")
    for name, tensor in tiny("vit").state_dict().items():
        assert torch.equal(kept[f"model.{name}"], tensor), name


@pytest.mark.parametrize("how", ["2-bf16", "3-no"])
def test_a_crash_leaves_no_trace(folder: Path, how: str) -> None:
    whole, resumed = of_all_ranks(folder, f"usual-{how}"), of_all_ranks(folder, f"resumed-{how}")
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key


def test_what_contradicts_itself_is_refused(folder: Path) -> None:
    first, second = (json.loads((folder / f"refused-rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    says = "ConfigError: the DeepSpeed config"
    expected = {
        "stage": "ConfigError: zero_stage=0",
        "batch": f"{says} says train_micro_batch_size_per_gpu=16, but this training has 4",
        "accumulation": f"{says} says gradient_accumulation_steps=8, but this training has 1",
        "clipping": f"{says} says gradient_clipping=0.5, but this training has 1.0",
        "optimizer": f"{says} has a section 'optimizer'",
        "scheduler": f"{says} has a section 'scheduler'",
        "offload": "ConfigError: offload_optimizer to 'cpu'",
        "order": "ConfigError: zero_optimization.round_robin_gradients=True",
        "fp16": "ConfigError: mixed_precision='fp16'",
        "batch norm": "ConfigError: DeepSpeed's bf16 leaves the statistics of batch norms",
        "ema": "ConfigError: ema_decay=0.9",
        "evaluation": "ConfigError: eval_steps=1",
        "not finite 2": "TrainingError: grad_norm was not finite",
        "not finite 3": "TrainingError: grad_norm was not finite",
    }
    assert first.keys() == expected.keys()
    for name, beginning in expected.items():
        assert first[name].startswith(beginning), first[name]
    for stage in (2, 3):  # the state of the step that spoilt the weights was not written
        assert [path.name for path in (folder / f"poisoned-{stage}").iterdir()] == ["step-00000001"]


def test_the_recipe_fine_tunes_and_searches(folder: Path) -> None:
    run = folder / "run"
    assert json.loads((run / "fliqs/results.json").read_text())["accuracy"]["searched"]["n"] == 16
    fine_tuned = AutoModelForImageClassification.from_pretrained(run / "fliqs/fp32")
    assert all(parameter.isfinite().all() and parameter.numel() for parameter in fine_tuned.parameters())
    steps = [json.loads(line)["step"] for line in (run / "fliqs/metrics.jsonl").read_text().splitlines()]
    assert steps == [3]
