"""LoRA adapters of peft on packed layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from fliqs_hf import FLIQSConfig, quantize
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn import packed_layers
from tests.helpers.models import images, tiny

peft = pytest.importorskip("peft", reason="needs peft: pip install 'fliqs-hf[peft]'")

TARGETS = {"vit": ["q_proj", "fc1", "projection"], "resnet": ["convolution"], "swin": ["query", "reduction"]}
LABELS = torch.tensor([0, 1, 2])


def packed(architecture: str = "vit", fmt: str = "int4") -> Any:
    return quantize(tiny(architecture), FLIQSConfig(weight_format=fmt, activation_format="e4m3"))


def lora(architecture: str = "vit", **options: Any) -> Any:
    return peft.LoraConfig(target_modules=TARGETS[architecture], r=4, lora_alpha=8, **options)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(images()).logits


def trained(model: Any, steps: int = 3) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        # in evaluation mode: means and variances of BatchNorm are no part of an adapter
        torch.nn.functional.cross_entropy(model.eval()(images()).logits, LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("architecture", TARGETS)
def test_adapters_train_on_frozen_codes_and_are_saved_apart(
    architecture: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = packed(architecture)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected, count = logits(base), len(packed_layers(base))
    model = peft.get_peft_model(base, lora(architecture))
    assert torch.equal(logits(model), expected)  # an adapter starts as nothing
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert not [w for w in recwarn if "Unsupported layer" in str(w.message)]
    after = logits(trained(model))
    assert not torch.equal(after, expected)
    assert len(packed_layers(model)) == count

    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 60_000
    again = peft.PeftModel.from_pretrained(packed(architecture), tmp_path)
    assert torch.equal(logits(again), after)
    with again.disable_adapter():
        assert torch.equal(logits(again), expected)
    plain = model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())


def test_a_packed_checkpoint_takes_an_adapter_of_transformers(tmp_path: Path) -> None:
    """`add_adapter` of the model itself, and Trainer, which refuses a packed model without an adapter."""
    packed().save_pretrained(tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    data = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images(), LABELS, strict=True)]
    options = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], learning_rate=0.01)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        Trainer(model, options, train_dataset=data)
    expected = logits(model)
    model.add_adapter(lora())
    Trainer(model, options, train_dataset=data).train()
    assert not torch.equal(logits(model), expected)
    wrapped = peft.get_peft_model(packed(), lora())
    before = logits(wrapped)
    Trainer(wrapped, options, train_dataset=data).train()
    assert not torch.equal(logits(wrapped), before)


def test_merging_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = trained(peft.get_peft_model(packed(), lora()))
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ConfigError, match="cannot be merged into packed codes"):
            merge()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    merged = peft.PeftModel.from_pretrained(packed().dequantize(), tmp_path).merge_and_unload()
    assert logits(merged).isfinite().all() and not packed_layers(merged)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_would_change_the_weight_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"call model\.dequantize\(\) first"):
        peft.get_peft_model(packed(), lora(**options))


def test_plain_layers_keep_the_adapters_of_peft() -> None:
    model = quantize(tiny("vit"), FLIQSConfig(modules_to_not_convert=["classifier"]))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["classifier", "fc1"], r=2))
    classes = {type(module).__name__ for name, module in model.named_modules() if name.endswith(("classifier", "fc1"))}
    assert classes == {"Linear", "LoraPackedLinear"}


def test_peft_is_imported_by_those_who_use_it(tmp_path: Path) -> None:
    packed().save_pretrained(tmp_path)
    code = (
        "import sys, fliqs_hf\nfrom transformers import AutoModelForImageClassification as Auto\n"
        f"Auto.from_pretrained({str(tmp_path)!r})\nassert 'peft' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
