"""The benchmark for GPUs, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "recipes/bench/gpu_all.py"


def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "unused", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
