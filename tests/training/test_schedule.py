"""The learning rate of every step, and the names that settings have elsewhere."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import get_token

from fliqs_hf.errors import ConfigError
from fliqs_hf.pipeline import search as recipe
from fliqs_hf.training import TrainConfig
from fliqs_hf.training.arguments import ARGUMENTS, parse
from fliqs_hf.training.foreign import ADVICE, ForeignArguments, advice
from fliqs_hf.training.loading import hub_token
from fliqs_hf.training.schedule import Schedule
from tests.recipes.test_vit import write


def rates(schedule: Schedule, **settings: Any) -> list[float]:
    config = TrainConfig(max_steps=8, learning_rate=1.0, schedule=schedule, **settings)
    return [config.learning_rate_at(step) for step in range(8)]


def test_every_schedule_is_a_function_of_the_step() -> None:
    cosine = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert rates("cosine", warmup_steps=2) == [0.5, 1.0, *cosine]
    assert rates("cosine", warmup_ratio=0.25) == [0.5, 1.0, *cosine]
    assert rates("linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates("constant_with_warmup", warmup_steps=2) == [0.5] + [1.0] * 7
    assert rates("constant") == [1.0] * 8
    assert rates("linear", warmup_steps=0) == [1 - k / 8 for k in range(8)]
    for settings in ({"schedule": "step"}, {"warmup_steps": 9}, {"schedule": "constant", "warmup_steps": 1}):
        with pytest.raises(ConfigError):
            TrainConfig(max_steps=8, **settings)  # type: ignore[arg-type]


def test_linear_is_that_of_transformers() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 4, 8)
    theirs = []
    for _ in range(8):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    # Ours warms up to the full rate at the last step of the warm-up, theirs one step later.
    assert rates("linear", warmup_steps=4)[4:] == theirs[4:]


def test_other_names_are_understood(tmp_path: Path) -> None:
    def training(text: str, *more: str) -> Any:
        (tmp_path / "s.yaml").write_text(text)
        return parse([str(tmp_path / "s.yaml"), *more])[2]

    assert training("bf16: true").mixed_precision == "bf16"
    assert training("bf16: false").mixed_precision is None
    assert training("seed: 0", "--bf16").mixed_precision == "bf16"
    assert training("mixed_precision: no").mixed_precision == "no"  # the word, which YAML takes for a truth value
    assert training("resume_from_checkpoint: true").resume
    assert not training("resume_from_checkpoint: false").resume
    assert training(f"output_dir: {tmp_path}", "--resume_from_checkpoint", str(tmp_path / "state")).resume
    assert training("lr_scheduler_type: linear\nwarmup_steps: 3").warmup_steps == 3
    assert training(f"seed: {2**32 - 1}").seed == 2**32 - 1
    assert training("max_steps: 1e3").max_steps == 1000


def test_every_setting_of_transformers_is_ours_or_explained() -> None:
    ours = {f.name for cls in (*ARGUMENTS, ForeignArguments) for f in fields(cls)}
    for f in fields(transformers.TrainingArguments):
        assert f.name in ours or advice(f.name), f.name
    assert not ours & ADVICE.keys()
    words = {word.strip(":,") for text in ADVICE.values() for word in text.split() if "_" in word}
    named = {word for word in words if word.islower() and word.replace("_", "").isalpha()}
    assert named - ours == {"--config_file", "--weight_format"} & named


def test_a_token_reaches_every_request_and_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    seen = []

    def stop(job: Any, _: Any) -> None:
        seen.append(get_token())
        raise ConfigError(repr(job))

    monkeypatch.setattr(recipe, "finetune", stop)
    with pytest.raises(ConfigError) as raised:
        recipe.main([str(write(tmp_path, token="hf_secret", cache_dir=str(tmp_path / "cache")))])
    assert seen == ["hf_secret"] and "hf_secret" not in str(raised.value)
    config = (tmp_path / "run" / "fliqs" / "settings.json").read_text()
    assert '"seed"' in config and '"cache_dir"' in config
    assert "hf_secret" not in config and '"token"' not in config
    assert get_token() != "hf_secret"
    with hub_token(None):
        assert get_token() != "hf_secret"
