"""Exported models against other programs' own quantizers and fp32: speed by turns in one process, size, agreement.

    python recipes/bench/export.py MODEL IMAGES --output results.json

Others are `quantize_dynamic` and `quantize_static` of ONNX Runtime and, where they are installed, best in an
environment of its own, `quantize` of NNCF in OpenVINO (`pip install nncf`) and of ModelOpt in ONNX (`pip install
"nvidia-modelopt[onnx]"`). Static scales are of the images that follow those compared. Files of OpenVINO run in the
precision that it takes by itself, and in fp32.

Speeds are ratios: those of one round's times, torch fp32 over the case, so more is faster; rows give the median over
rounds. Agreement is with the model that was exported: with fp32 for fp32 and for what others quantize, with the packed
model for ours; beside it stands how often that model agrees with itself when pixels move by a millionth. Images are
the first ones of a random order.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import openvino
import torch
from onnxruntime import __version__ as onnxruntime_version
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.exporters import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

import fliqs_hf
from fliqs_hf import FLIQSConfig
from fliqs_hf.hf.export.agreement import compare
from fliqs_hf.hf.export.forms import OnnxSettings
from fliqs_hf.hf.export.onnx_file import write_onnx
from fliqs_hf.hf.export.openvino_file import OpenVinoSettings, write_openvino
from fliqs_hf.hf.export.runtime import OnnxClassifier, OpenVinoClassifier
from fliqs_hf.tasks import IMAGE_CLASSIFICATION
from fliqs_hf.timing import interleaved, ratios
from fliqs_hf.training.data import Images
from fliqs_hf.training.images import pixels
from fliqs_hf.training.splits import load_split, sample
from recipes.bench.inference import conditions

#: case -> weights, inputs, settings of the export
OURS = {
    "W8A8 auto": ("int8", "int8", {}),
    "W4A8 auto": ("int4", "int8", {}),
    "W8A8 integer": ("int8", "int8", {"form": "integer"}),
    "W8A8 qdq": ("int8", "int8", {"form": "qdq"}),
    "W8A8 per_tensor": ("int8", "int8", {"input_scales": "per_tensor"}),
}
#: The same for OpenVINO.
OURS_IN_OPENVINO = {
    "W8A8 openvino": ("int8", "int8", {}),
    "W4A8 openvino": ("int4", "int8", {}),
    "W8A8 openvino as_packed": ("int8", "int8", {"inputs": "as_packed"}),
}


class _Calibration(CalibrationDataReader):
    """Image by image."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self.images, None)
        return None if image is None else {"pixel_values": image[None].numpy()}


def cases(
    plain: Any, image: torch.Tensor, calibration: torch.Tensor, folder: Path
) -> dict[str, tuple[Any, Any, float | None]]:
    """Case -> what runs, the model that it should agree with, and its size in MB."""
    threads = torch.get_num_threads()
    made: dict[str, tuple[Any, Any, float | None]] = {"torch fp32": (plain, plain, None)}

    def add(name: str, file: Path, reference: Any) -> None:
        made[name] = (OnnxClassifier(file, threads=threads), reference, file.stat().st_size / 1e6)

    fp32 = folder / "fp32.onnx"
    config = OnnxConfig(
        dynamic=True, opset_version=21, dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}}
    )
    graph = OnnxExporter().export(plain, {"pixel_values": image.expand(2, -1, -1, -1).contiguous()}, config)
    graph.save_pretrained(folder / "fp32")
    proto = onnx.load(folder / "fp32" / "model.onnx")
    onnx.save(proto, fp32)
    add("fp32", fp32, plain)
    del proto.graph.value_info[:]
    onnx.save(proto, folder / "clean.onnx")
    for per_channel in (False, True):
        name = "quantize_dynamic" + (" per channel" if per_channel else "")
        quantize_dynamic(folder / "clean.onnx", folder / f"{name}.onnx", per_channel=per_channel)
        add(name, folder / f"{name}.onnx", plain)
    for name in static_files(folder, calibration):
        add(name, folder / f"{name}.onnx", plain)
    for name, (weight, activation, settings) in OURS.items():
        packed = fliqs_hf.quantize(
            copy.deepcopy(plain), FLIQSConfig(weight_format=weight, activation_format=activation)
        )
        write_onnx(packed, image, folder / f"{name}.onnx", OnnxSettings(**settings))
        add(name, folder / f"{name}.onnx", packed)
    return made


def static_files(folder: Path, calibration: torch.Tensor) -> list[str]:
    """The names of files with static scales, made of clean.onnx in `folder`."""
    quant_pre_process(folder / "clean.onnx", folder / "prepared.onnx", skip_symbolic_shape=True)
    quantize_static(
        folder / "prepared.onnx", folder / "quantize_static.onnx", _Calibration(calibration),
        quant_format=QuantFormat.QDQ, per_channel=True,
    )  # fmt: skip
    if importlib.util.find_spec("modelopt") is None:
        print("ModelOpt is not installed: left out")
        return ["quantize_static"]
    modelopt = importlib.import_module("modelopt.onnx.quantization")
    modelopt.quantize(
        str(folder / "prepared.onnx"), quantize_mode="int8", calibration_data=calibration.numpy(),
        calibration_method="max", calibration_eps=["cpu"], high_precision_dtype="fp32",
        output_path=str(folder / "modelopt.onnx"),
    )  # fmt: skip
    return ["quantize_static", "modelopt"]


def openvino_cases(
    plain: Any, image: torch.Tensor, calibration: torch.Tensor, folder: Path
) -> dict[str, tuple[Any, Any, float | None]]:
    """As `cases`, which has left fp32.onnx in `folder`."""
    made: dict[str, tuple[Any, Any, float | None]] = {}

    def add(name: str, file: Path, reference: Any) -> None:
        for precision in (None, "f32"):
            model = OpenVinoClassifier(file, threads=torch.get_num_threads(), precision=precision)
            made[f"{name}, {model.precision}"] = (model, reference, model.file_bytes / 1e6)

    read = openvino.Core().read_model(folder / "fp32.onnx")
    openvino.save_model(read, folder / "fp32.xml", compress_to_fp16=False)
    add("openvino fp32", folder / "fp32.xml", plain)
    for name, (weight, activation, settings) in OURS_IN_OPENVINO.items():
        config = FLIQSConfig(weight_format=weight, activation_format=activation)
        packed = fliqs_hf.quantize(copy.deepcopy(plain), config)
        write_openvino(packed, image, folder / f"{name}.xml", OpenVinoSettings(**settings))
        add(name, folder / f"{name}.xml", packed)
    if importlib.util.find_spec("nncf") is None:
        print("NNCF is not installed: left out")
        return made
    nncf = importlib.import_module("nncf")
    data = nncf.Dataset([pixels[None].numpy() for pixels in calibration])
    transformer = nncf.ModelType.TRANSFORMER if hasattr(plain.config, "num_attention_heads") else None
    quantized = nncf.quantize(read, data, model_type=transformer, subset_size=len(calibration))
    openvino.save_model(quantized, folder / "nncf.xml", compress_to_fp16=False)
    add("nncf", folder / "nncf.xml", plain)
    return made


@torch.no_grad()
def speeds(
    made: dict[str, tuple[Any, Any, float | None]], images: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    times = interleaved({name: partial(model, images) for name, (model, _, _) in made.items()}, rounds)
    return {name: ratios(times["torch fp32"], own) for name, own in times.items()}


@torch.no_grad()
def top1(model: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent."""
    answers = torch.cat([IMAGE_CLASSIFICATION.prediction(model(batch)).argmax(-1) for batch in images.split(20)])
    return 100 * float((answers == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="fp32 checkpoint")
    parser.add_argument("dataset_name")
    parser.add_argument("--split")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--calibration", type=int, default=100, help="images that static scales are of")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plain = AutoModelForImageClassification.from_pretrained(args.model).eval()
    processor = AutoImageProcessor.from_pretrained(args.model)
    split = sample(load_split(args.dataset_name, args.split)[0], args.images + args.calibration)
    images = Images(split, "image")
    everything = torch.stack([pixels(*images[index][:1], processor, images[index][1]) for index in range(len(images))])
    labels = torch.tensor(split[args.label_column][: args.images])
    stacked, calibration = everything[: args.images], everything[args.images :]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = cases(plain, stacked[:1], calibration, Path(folder))
        made |= openvino_cases(plain, stacked[:1], calibration, Path(folder))
        ratios = {batch: speeds(made, stacked[:batch], args.rounds) for batch in args.batch_sizes}
        for name, (model, reference, size) in made.items():
            agreement = compare(reference, model, stacked.split(20), itself=True)
            assert agreement.itself is not None, "asked for"
            row = {
                "case": name, "mb": size and round(size, 2), "top1": round(top1(model, stacked, labels), 2),
                "agreement": round(agreement.percent, 2), "rms": round(agreement.rms, 4),
                "with_itself": round(100 * agreement.itself / agreement.images, 2),
                **{f"speed_{batch}": round(statistics.median(found[name]), 2) for batch, found in ratios.items()},
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    if args.output:
        data = {
            "conditions": {**conditions(), "onnxruntime": onnxruntime_version, "openvino": openvino.__version__},
            "images": args.images,
            "rows": rows,
        }
        args.output.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
