"""Compare with NVIDIA ModelOpt's auto_quantize: same model, formats and images, costs by one model, three stages.

    python recipes/bench/compare_modelopt.py prepare MODEL DATA runs/modelopt       # in this project's environment
    MODELOPT_PYTHON recipes/bench/compare_modelopt.py search MODEL runs/modelopt    # in one with nvidia-modelopt
    python recipes/bench/compare_modelopt.py compare MODEL runs/modelopt --output FILE.csv

docs/modelopt.md says how the environments are made and what the columns mean. `search` imports nothing of fliqs_hf.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForImageClassification

#: ModelOpt's `num_bits` of the candidates: whole numbers are INT, pairs are (exponent, mantissa).
CANDIDATES: dict[str, Any] = {"int4": 4, "int8": 8, "e4m3": (4, 3)}
#: What ModelOpt scales inputs by: one static number per tensor, its default, or one per token (image for convolutions)
#: found at run time, as this project does.
GRANULARITIES = ("per-tensor", "per-token")
PARTS = ("calibration", "test")
COLUMNS = (
    "formats", "granularity", "effective_bits", "method", "quantizers", "gbops", "weight_kb", "agreement", "top1",
    "loss", "search_s", "solve_s", "allocation",
)  # fmt: skip


def batches(images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(part).logits for part in images.split(32)])


def measures(logits: Tensor, labels: Tensor, fp32: Tensor) -> dict[str, float]:
    """Agreement of the predicted classes with those in fp32, top-1 and mean cross-entropy."""
    return {
        "agreement": round((logits.argmax(-1) == fp32.argmax(-1)).float().mean().item(), 5),
        "top1": round((logits.argmax(-1) == labels).float().mean().item(), 5),
        "loss": round(functional.cross_entropy(logits, labels).item(), 5),
    }


def prepare(arguments: argparse.Namespace) -> None:
    """Processed images of both parts, so that the other environment needs no data set library."""
    from transformers import AutoImageProcessor

    from fliqs_hf.training import ImageData, load_splits

    if there := [name for name in PARTS if (arguments.folder / f"{name}.safetensors").exists()]:
        sys.exit(f"{arguments.folder} holds {there[0]}.safetensors already: remove it, or choose another folder")
    split = load_splits(arguments.data)[0]
    labels = AutoModelForImageClassification.from_pretrained(arguments.model).config.num_labels
    data = ImageData(split, AutoImageProcessor.from_pretrained(arguments.model), labels)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    parts = order[: arguments.images], order[arguments.images :][: arguments.test_images]
    cuts = dict(zip(PARTS, parts, strict=True))
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name, indices in cuts.items():
        pairs = [data[index] for index in indices]
        tensors = {"images": torch.stack([image for image, _ in pairs]), "labels": torch.tensor([y for _, y in pairs])}
        save_file(tensors, arguments.folder / f"{name}.safetensors")


def modelopt_formats(formats: list[str], granularity: str, convolution: bool) -> list[dict[str, Any]]:
    """The candidates as ModelOpt's configurations: weights per output channel, both roles in one format."""
    dynamic = {"axis": 0} if convolution else {"block_sizes": {-1: None}}
    scale = {"axis": None} if granularity == "per-tensor" else {"type": "dynamic", **dynamic}
    return [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": bits, **scale}},
            ],
            "algorithm": "max",
        }
        for bits in (CANDIDATES[name] for name in formats)
    ]


def chosen_formats(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Layer -> {"weight": format, "activation": format} of a configuration that ModelOpt's search gave."""
    names = {value: name for name, value in CANDIDATES.items()}
    formats: dict[str, dict[str, str]] = {}
    for entry in config["quant_cfg"]:
        layer, _, quantizer = entry["quantizer_name"].rpartition(".")
        role = {"weight_quantizer": "weight", "input_quantizer": "activation"}.get(quantizer)
        if layer and role and entry["enable"]:
            bits = entry["cfg"]["num_bits"]
            formats.setdefault(layer, {})[role] = names[tuple(bits) if isinstance(bits, list) else bits]
    return formats


def search(arguments: argparse.Namespace) -> None:
    """ModelOpt's searches and what its own quantizers make of the results, added to `modelopt.json`."""
    import modelopt.torch.quantization as mtq

    def load() -> Any:
        return AutoModelForImageClassification.from_pretrained(arguments.model).eval()

    calibration, test = (load_file(arguments.folder / f"{name}.safetensors") for name in ("calibration", "test"))
    data = batches(calibration["images"], calibration["labels"], arguments.batch_size)
    fp32 = logits_of(load(), test["images"])
    file = arguments.folder / "modelopt.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for granularity in arguments.granularities:
        seen = data if granularity == "per-tensor" else data[:1]  # scales found at run time need no calibration
        model, start = load(), time.perf_counter()
        convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        spaces = [
            {
                "module_name_patterns": names,
                "quantization_formats": modelopt_formats(arguments.formats, granularity, convolution),
                "allow_no_quant": False,
            }
            for names, convolution in ((convolutions, True), (linears, False))
        ]
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": arguments.effective_bits[0]},
            quantization_formats=modelopt_formats(arguments.formats, granularity, False),
            data_loader=data,
            forward_step=lambda model, batch: model(batch[0]).logits,
            loss_func=lambda logits, batch: functional.cross_entropy(logits, batch[1]),
            num_calib_steps=len(seen),
            num_score_steps=len(data),
            module_search_spaces=spaces,
        )
        seconds = time.perf_counter() - start
        for bits in arguments.effective_bits:
            start = time.perf_counter()
            config = mtq.get_auto_quantize_config(state, {"effective_bits": bits})
            solve = time.perf_counter() - start
            own = mtq.quantize(load(), config, lambda model, seen=seen: [model(images) for images, _ in seen])
            rows.append(
                {
                    "formats": arguments.formats,
                    "granularity": granularity,
                    "effective_bits": bits,
                    "layers": chosen_formats(config),
                    "search_s": round(seconds, 1),
                    "solve_s": round(solve, 4),
                    "own": measures(logits_of(own, test["images"]), test["labels"], fp32),
                }
            )
            print(granularity, bits, rows[-1]["own"], flush=True)
            found = {"modelopt": version("nvidia-modelopt"), "torch": torch.__version__, "rows": rows}
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")


class Table:
    """Rows of the comparison: allocations in our quantizers, each measured once, also over several runs."""

    def __init__(self, arguments: argparse.Namespace, calibration: dict[str, Tensor], test: dict[str, Tensor]) -> None:
        from fliqs_hf.cost import trace_layers
        from fliqs_hf.selection import SearchSpace

        self.name, self.calibration, self.test = arguments.model, calibration["images"], test
        self.model = AutoModelForImageClassification.from_pretrained(arguments.model).eval()
        self.layers = trace_layers(self.model, test["images"][:1])
        self.space = SearchSpace(self.layers, list(CANDIDATES))
        data = batches(calibration["images"], calibration["labels"], arguments.batch_size)
        self.scores = self._scores(data)
        self.fp32 = logits_of(self.model, test["images"])
        self.file = arguments.folder / "measured.json"
        self.known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.switch = self._switch()

    def _scores(self, data: list[tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, float]]:
        """Ours of every choice of every decision, and the seconds that they took."""
        from fliqs_hf.selection import find_score

        found = {
            name: find_score(name)(self.model, data, lambda x: self.model(x).logits, self.space)
            for name in ("fisher", "elementwise")
        }
        return {name: (one.decision_scores, round(one.seconds, 1)) for name, one in found.items()}

    def _switch(self) -> Any:
        from fliqs_hf.nn import make_searchable

        groups = {layer.name: layer.input_group for layer in self.layers}
        return make_searchable(self.model, self.space.formats, names=list(groups), input_groups=groups)

    def measured(self, allocation: Any, rounding: str) -> dict[str, float]:
        from fliqs_hf.cli.calibration import ROUNDING_IMAGES
        from fliqs_hf.ptq import calibrate

        key = json.dumps(allocation.to_dict()) + ("" if rounding == "nearest" else rounding)
        if key not in self.known:
            model = self.model
            if rounding == "nearest":
                self.switch.set_allocation(allocation)
            else:
                model = AutoModelForImageClassification.from_pretrained(self.name)
                calibrate(model, allocation, self.calibration[:ROUNDING_IMAGES].split(32))
            self.known[key] = measures(logits_of(model, self.test["images"]), self.test["labels"], self.fp32)
            self.file.write_text(json.dumps(self.known), encoding="utf-8")
        return self.known[key]

    def row(
        self,
        head: dict[str, Any],
        method: str,
        allocation: Any,
        seconds: float,
        solve: float,
        rounding: str = "nearest",
    ) -> dict[str, Any]:
        from fliqs_hf.cost import bops, weight_bytes

        return {
            **head, "method": method, "quantizers": "fliqs-hf" if rounding == "nearest" else f"fliqs-hf, {rounding}",
            "gbops": round(bops(self.layers, allocation) / 1e9, 3),
            "weight_kb": round(weight_bytes(self.layers, allocation) / 1e3, 1), **self.measured(allocation, rounding),
            "search_s": seconds, "solve_s": round(solve, 4), "allocation": allocation.summary(),
        }  # fmt: skip

    def rows_beside(self, result: dict[str, Any]) -> list[dict[str, Any]]:
        """One of ModelOpt's results, in our quantizers and in its own, and ours at no more than its cost."""
        from fliqs_hf.allocation import Allocation, LayerFormats
        from fliqs_hf.cost import CostTable
        from fliqs_hf.selection import SearchProblem, SearchSpace

        head = {
            "formats": " ".join(result["formats"]),
            "granularity": result["granularity"],
            "effective_bits": result["effective_bits"],
        }
        theirs = Allocation({name: LayerFormats.of(**pair) for name, pair in result["layers"].items()})
        rows = [self.row(head, "modelopt", theirs, result["search_s"], result["solve_s"])]
        rows.append(rows[-1] | {"quantizers": "modelopt", **result["own"]})
        part = SearchSpace(self.layers, result["formats"])
        columns = [self.space.formats.index(fmt) for fmt in part.formats]
        problem = SearchProblem(part, CostTable(self.layers, part.formats))
        for name, (values, seconds) in self.scores.items():
            start = time.perf_counter()
            choice = problem.best_choice(-values[:, columns], low=-torch.inf, high=problem.costs.of(theirs))
            solve = time.perf_counter() - start
            rows.append(self.row(head, name, ours := part.allocation(choice), seconds, solve))
            if name == "fisher" and result["granularity"] == "per-token" and len(part.formats) == len(CANDIDATES):
                rows.append(self.row(head, "modelopt", theirs, result["search_s"], result["solve_s"], "gptq"))
                rows.append(self.row(head, name, ours, seconds, solve, "gptq"))
            print({key: rows[-1][key] for key in COLUMNS[:10]}, flush=True)
        return rows


def compare(arguments: argparse.Namespace) -> None:
    """Our allocation at no more than the cost of each of ModelOpt's, and all of them in our quantizers."""
    from fliqs_hf.baselines import uniform
    from fliqs_hf.pipeline.outputs import check_result_file
    from fliqs_hf.runs.folder import versions

    check_result_file(arguments.output, lambda head: "recipes/bench/compare_modelopt.py" in head)
    calibration, test = (load_file(arguments.folder / f"{name}.safetensors") for name in ("calibration", "test"))
    found = json.loads((arguments.folder / "modelopt.json").read_text(encoding="utf-8"))
    table = Table(arguments, calibration, test)
    reference = measures(table.fp32, test["labels"], table.fp32)
    rows = [table.row({}, f"uniform-{name}", uniform(table.layers, name), 0.0, 0.0) for name in CANDIDATES]
    for result in found["rows"]:
        rows += table.rows_beside(result)
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# python recipes/bench/compare_modelopt.py {' '.join(sys.argv[1:])}\n")
        file.write(f"# {versions()}; nvidia-modelopt {found['modelopt']} on torch {found['torch']}; {hardware}\n")
        file.write(
            f"# {len(calibration['labels'])} images for the scores, {len(test['labels'])} others measured; "
            f"fp32: top1 {reference['top1']:.4f}, loss {reference['loss']:.4f}; seconds: machine under varying load\n"
        )
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, stage in (("prepare", prepare), ("search", search), ("compare", compare)):
        command = stages.add_parser(name)
        command.set_defaults(run=stage)
        command.add_argument("model", help="folder or name of the fp32 checkpoint")
        if stage is prepare:
            command.add_argument("data", help="folder or name of an image data set")
            command.add_argument("--images", type=int, default=512, help="for calibration and scores")
            command.add_argument("--test_images", type=int, help="default: all the others of the training split")
            command.add_argument("--seed", type=int, default=0)
        else:
            command.add_argument("--batch_size", type=int, default=16)
        command.add_argument("folder", type=Path, help="where the stages leave files for each other")
        if stage is search:
            command.add_argument("--effective_bits", nargs="+", type=float, default=[4.5, 5, 6, 7])
            command.add_argument("--granularities", nargs="+", default=GRANULARITIES, choices=GRANULARITIES)
            command.add_argument("--formats", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
        if stage is compare:
            command.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
