"""Native kernels in whole models: loaded, saved, copied, moved, run by threads and in pipelines."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor, pipeline

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.errors import ConfigError
from fliqs_hf.nn.kernels import ENVIRONMENT, kernels_of, set_kernels
from tests.helpers.kernels import WAYS, choose_way
from tests.helpers.models import tiny


@pytest.fixture(autouse=True, params=WAYS)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose_way(request.param, monkeypatch)
    return str(request.param)


def test_models_run_with_it_from_loading_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4"))
    model.save_pretrained(tmp_path / "one")
    loaded = type(model).from_pretrained(tmp_path / "one")
    assert {choice.kernel for choice in kernels_of(loaded).values()} == {"int8"}
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        native_logits = loaded(images).logits
        assert torch.equal(native_logits, model(images).logits)  # reloading gives the same bits
        assert torch.equal(native_logits[:1], loaded(images[:1]).logits)
    loaded.save_pretrained(tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    set_kernels(loaded, "reference")
    with torch.no_grad():
        reference = loaded(images).logits
    assert not torch.equal(reference, native_logits)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    loaded = type(model).from_pretrained(tmp_path / "one")
    assert {choice.reason for choice in kernels_of(loaded).values()} == {"asked for"}
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, reference)
    monkeypatch.delenv(ENVIRONMENT)
    loaded = type(model).from_pretrained(tmp_path / "one", quantization_config=FLIQSConfig(kernels="reference"))
    assert {choice.reason for choice in kernels_of(loaded).values()} == {"asked for"}
    assert "kernels" not in loaded.config.quantization_config.to_dict()


def test_models_are_copied_moved_pickled_and_run_by_threads(tmp_path: Path) -> None:
    formats = {"weight_format": "int4", "overrides": {"classifier": "e4m3"}}
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig(**formats))  # type: ignore[arg-type]
    assert {choice.kernel for choice in kernels_of(model).values()} == {"int8", "decoded"}
    inputs = [torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(n)) for n in (1, 7, 64)]
    with torch.inference_mode():
        expected = [model(x).logits for x in inputs]
        torch.save(model, tmp_path / "whole.pt")
        unpickled = torch.load(tmp_path / "whole.pt", weights_only=False)
        for other in (copy.deepcopy(model), unpickled, copy.deepcopy(model).to("cpu")):
            assert kernels_of(other) == kernels_of(model)
            assert all(torch.equal(other(x).logits, y) for x, y in zip(inputs, expected, strict=True))
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert half(inputs[0].bfloat16()).logits.dtype == torch.bfloat16
        assert model(torch.rand(2, 3, 41, 35), interpolate_pos_encoding=True).logits.shape == (2, 5)

    fresh, wrong = copy.deepcopy(model), []  # threads prepare the weights at the same time

    def run(number: int) -> None:
        with torch.no_grad():
            same = [torch.equal(fresh(inputs[number]).logits, expected[number]) for _ in range(5)]
        if not all(same):
            wrong.append(number)

    threads = [threading.Thread(target=run, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_pipelines_and_device_maps(tmp_path: Path) -> None:
    fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="int4")).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    image = Image.new("RGB", (50, 40), (90, 30, 200))
    found = pipeline("image-classification", str(tmp_path))(image)
    for device_map in ("cpu", "auto"):
        mapped = ViTForImageClassification.from_pretrained(tmp_path, device_map=device_map)
        if mapped.device.type == "cpu":
            assert {choice.kernel for choice in kernels_of(mapped).values()} == {"int8"}
            pixels = ViTImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")
            with torch.no_grad():
                assert mapped(**pixels).logits.softmax(-1).max().item() == pytest.approx(found[0]["score"], abs=1e-6)


def test_no_weight_cache_keeps_nothing(tmp_path: Path) -> None:
    fliqs_hf.quantize(tiny("vit"), FLIQSConfig(weight_format="e4m3")).save_pretrained(tmp_path)
    few = FLIQSConfig(weight_cache="none")
    kept, none = (
        ViTForImageClassification.from_pretrained(tmp_path, **options)
        for options in ({}, {"quantization_config": few})
    )
    assert {choice.kernel for choice in kernels_of(kept).values()} == {"decoded"}
    assert {choice.kernel for choice in kernels_of(none).values()} == {"reference"}
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(kept(x).logits, none(x).logits)
    assert "weight_cache" not in kept.config.quantization_config.to_dict()


def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fliqs_hf.quantize(tiny("vit"), FLIQSConfig())
    with pytest.raises(ConfigError, match="kernels='fast'"):
        set_kernels(model, "fast")  # type: ignore[arg-type]
    monkeypatch.setenv(ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT}='fast'"):
        set_kernels(model)
