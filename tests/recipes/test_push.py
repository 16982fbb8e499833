"""`--push_to_hub`: a searched model arrives on the (loopback) Hub and loads in another process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification

from fliqs_hf.errors import HubError
from fliqs_hf.pipeline import outside
from fliqs_hf.pipeline.search import main
from tests.helpers.hub_server import HubServer
from tests.helpers.models import images
from tests.recipes.test_vit import command, write

LOAD = """
import sys, torch, fliqs_hf
from transformers import AutoModelForImageClassification
torch.set_num_threads(int(sys.argv[2]))
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load("images.pt")).logits, "logits.pt")
"""


def test_a_front_is_published_and_one_refusal_does_not_stop_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[tuple[str, str]] = []

    def push(folder: Path, name: str) -> str:
        pushed.append((folder.name, name))
        if len(pushed) == 1:
            raise HubError("the Hub refused.")
        return "https://hub/commit"

    made: list[tuple[str, bool | None]] = []
    monkeypatch.setattr(
        outside, "make_repository", lambda name, private: made.append((name, private)) or f"user/{name}"
    )
    monkeypatch.setattr(outside, "push_run", push)
    bops = [1.5e6, 2e6]
    file = write(tmp_path, finetune_steps=0, max_steps=4, target_bits=None, target_bops=bops, push_to_hub=True)
    with pytest.raises(
        HubError, match=r"the Hub refused. The run is complete: fliqs-hf push .*bops-1.5e06 user/run-bops-1.5e06$"
    ):
        main([str(file), "--hub_private_repo", "true"])
    assert made == [("run-bops-1.5e06", True), ("run-bops-2e06", True)]  # names that the Hub takes: without a +
    assert pushed == [("bops-1.5e06", "user/run-bops-1.5e06"), ("bops-2e06", "user/run-bops-2e06")]
    assert "published at https://hub/commit" in capsys.readouterr().out
    assert (tmp_path / "run" / "fliqs/front.csv").exists()


@pytest.mark.slow
def test_the_recipe_publishes_its_run(tmp_path: Path) -> None:
    file = write(tmp_path, finetune_steps=0, max_steps=6)
    x = images(3)[..., :8, :8].contiguous()
    torch.save(x, tmp_path / "images.pt")
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home")
        arguments = command(file, "--push_to_hub", "--hub_model_id", "user/digits")
        run = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        assert "published at" in run.stdout
        published = hub.repos["user/digits"].files()
        assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(published)
        assert {"fliqs/allocation.json", "fliqs/report.html", "fliqs/figures/allocation.png"} <= set(published)
        loading = [sys.executable, "-c", LOAD, "user/digits", str(torch.get_num_threads())]
        subprocess.run(loading, cwd=tmp_path, env=environment, check=True)
    local = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), local(x).logits)
