"""A server that only loads packed models needs none of the libraries that search, data and reports use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import fliqs_hf
from tests.helpers.models import tiny

ROOT = Path(__file__).parents[2]

#: What `pip install fliqs-hf` brings beside torch, Transformers and what those need themselves.
HIDDEN = ("accelerate", "datasets", "evaluate", "matplotlib", "optimum", "pandas", "pyarrow", "scipy", "xxhash")

SERVER = f"""
import sys
hidden = {HIDDEN!r}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
folder, answers = sys.argv[1:]

import fliqs_hf, torch
from fliqs_hf.pipeline.checkpoints import load_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

fixed = load_file(answers)
for model in (AutoModelForImageClassification.from_pretrained(folder).eval(), load_model(folder)):
    with torch.no_grad():
        assert torch.equal(model(fixed["images"]).logits, fixed["logits"])
plain = model.dequantize()
fliqs_hf.quantize(plain, fliqs_hf.FLIQSConfig(weight_format="int4"))
found = sorted({{name.partition(".")[0] for name in sys.modules}} & set(hidden))
assert not found, found
"""


def test_loading_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = fliqs_hf.quantize(tiny("vit"), fliqs_hf.FLIQSConfig())
    model.save_pretrained(tmp_path / "model")
    size = model.config.image_size
    images = torch.rand(2, model.config.num_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        save_file({"images": images, "logits": model(images).logits}, tmp_path / "answers.safetensors")
    command = [sys.executable, "-c", SERVER, str(tmp_path / "model"), str(tmp_path / "answers.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
