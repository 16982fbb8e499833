"""Fixtures of every test: nothing from the network, GPU tests where there is a GPU, the sample data if it is there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before Transformers is imported. Tests that speak to a server of their own on the loopback interface set these back.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run side by side: threads of one would only take the cores of another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub.constants
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from tests.helpers.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parents[1]

# A runner in the background may have these ignored, which every process below would inherit.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session", autouse=True)
def detected() -> Iterator[Callable[[], str]]:
    """Every test takes this machine for one of VNNI, as what is chosen by default differs from machine to machine.

    Yields: what tells the machine that it is.
    """
    from fliqs_hf.cost import hardware

    original = hardware.detected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "detected", lambda: "x86-vnni")
        yield original


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and weights beside the project; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the sample data in ../shared/data")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub that this process is logged in to."""
    with HubServer() as server:
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # Transformers keeps the client that it made first, with the Hub's address of that time.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
