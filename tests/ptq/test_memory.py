"""How many images fit, against a model whose largest layer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fliqs_hf.ptq import memory


@pytest.mark.parametrize(("free", "images"), [(0, 1), (2 * 6 * 4 * 200 - 1, 1), (2 * 6 * 4 * 200, 1), (96_000, 10)])
def test_the_largest_layer_and_the_free_memory_decide(free: int, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times the 192 + 8 elements of the first layer's input and output, 4 bytes each, in half of what is free."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 3))
    assert memory.fitting_images(model, torch.zeros(1, 3, 8, 8)) == images
    assert memory.room(torch.device("cpu")) == free // 2
