"""What the commands are run on: a small model, images with labels, a packed run, and names that are no models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from fliqs_hf_cli import main
from tests.helpers.bad_input import refuse_to_load, write_models
from tests.helpers.outputs import write_model, write_photos


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fp32"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, fp32: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "run"
    assert main(["quantize", str(fp32), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of `write_models`."""
    folder = tmp_path_factory.mktemp("there")
    write_models(folder)
    return folder


@pytest.fixture
def _nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_load(monkeypatch)


@pytest.fixture(autouse=True)
def _new_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
