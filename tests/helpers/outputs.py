"""What tests of the files that commands write share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from fliqs_hf_cli import main
from tests.helpers.models import tiny


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, with links as what they say."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in found
    }


def fill(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'"of somebody else: {name}"')
    return contents(folder)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert "Error: " in error and "Traceback" not in error
    return error


def write_model(folder: Path) -> Path:
    """An fp32 checkpoint."""
    tiny("vit", 0).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_photos(folder: Path) -> Path:
    """Ten images of its five classes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (10, 32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    names = [f"LABEL_{i}" for i in range(5)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [PILImage.fromarray(picture) for picture in pixels], "label": [i % 5 for i in range(10)]}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00000-of-00001.parquet")
    return folder
