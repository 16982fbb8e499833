"""The arguments of `fliqs-hf export`; what it does is in `fliqs_hf/cli/export.py`."""

from __future__ import annotations

from fliqs_hf_cli.parser import Parser, columns, task

HELP = "a packed model for other programs: ONNX, OpenVINO, torch.export, compared with itself"
EXAMPLES = """  fliqs-hf export runs/pilot exported --dataset_name photos/ --min_agreement 99
  fliqs-hf export runs/pilot exported --form qdq               for TensorRT and NPUs; static scales fit best
  fliqs-hf export runs/pilot exported --to openvino
  fliqs-hf export runs/pilot config --to torchao               a format per layer, as torchao's FqnToConfig
  fliqs-hf validate MODEL exported --dataset_name photos/      the file, as a model like any other
The file runs in ONNX Runtime or OpenVINO without this package, and holds the allocation. Before it is kept,
it answers the same images as the packed model; exit status 1, and no file, where too few answers are the same."""


def arguments(parser: Parser) -> None:
    parser.add_argument("run", help="run folder, checkpoint folder or Hub id of a packed model")
    parser.add_argument(
        "output",
        help="folder to write: model.onnx or the like, its config and image processor, a record",
    )
    parser.add_argument("--to", choices=("onnx", "openvino", "torch", "aotinductor", "torchao", "modelopt"),
                        default="onnx",
                        help="a file of ONNX or OpenVINO, a program of torch.export (.pt2), or that compiled, for "
                        "which there must be a C++ compiler; or the formats alone, as a config with which torchao or "
                        "ModelOpt quantizes the original; default: %(default)s")  # fmt: skip
    parser.add_argument("--form", choices=("auto", "integer", "qdq"),
                        help="products of 8-bit integers, in the fastest operators of ONNX Runtime (auto, the "
                        "default) or in those of the standard (integer), or between QuantizeLinear and "
                        "DequantizeLinear (qdq)")  # fmt: skip
    parser.add_argument("--input_scales", choices=("as_packed", "per_tensor"),
                        help="per_tensor: one scale for the whole batch where inputs are 8-bit integers: faster, and "
                        "another quantization")  # fmt: skip
    parser.add_argument("--inputs", choices=("auto", "as_packed"),
                        help="of OpenVINO: as_packed rounds all inputs in the graph, instead of leaving those of 8 "
                        "bits and more to its own quantization")  # fmt: skip
    parser.add_argument("--dataset_name", help="images to compare on: Hub id, folder of images, or 'digits'; default: "
                        "generated noise")  # fmt: skip
    parser.add_argument("--split", help="or a part, such as 'test[:500]'; default: validation or test if there is one")
    columns(parser, None)
    task(parser)
    parser.add_argument("--max_samples", type=int, default=256, help="images to compare on (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--min_agreement", type=float, metavar="PERCENT",
                        help="of the images must get the class that the packed model gives them; default with "
                        "--dataset_name: 95, or less where the packed model changes more answers when pixels move by "
                        "a millionth; 0 on noise")  # fmt: skip
    parser.add_argument("--opset", type=int, help="21 to 25 (default: 21); 25 has 2-bit types")
    parser.add_argument("--weight_codes", choices=("signed", "unsigned"),
                        help="unsigned: exact on x86 CPUs without VNNI too, which saturate large signed codes; slower "
                        "elsewhere")  # fmt: skip
    parser.add_argument("--include_preprocessing", action="store_true",
                        help="take pixels from 0 to 255 of resized images, and normalize them there")  # fmt: skip
    parser.add_argument(
        "--external_data", action="store_true", default=None, help="weights in model.onnx.data; always above 1.8 GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that is in OUTPUT")
