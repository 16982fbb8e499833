"""Load an exported ONNX folder in optimum's `ORTModelForImageClassification`, in an environment of its own.

    python recipes/load_in_optimum.py exported image.jpg … --environment optimum-venv

optimum-onnx 0.1.0 needs an older Transformers than this package, so the environment is made at the first use. To keep
pip from fetching CUDA with torch, name its CPU build: `--torch 2.13.0+cpu`, and in the environment variable
PIP_EXTRA_INDEX_URL where it is, https://download.pytorch.org/whl/cpu. The script then runs itself there, where it
imports nothing of fliqs_hf: it answers the images through optimum's image processor and model, and compares the logits
with those of ONNX Runtime alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

#: The newest that optimum-onnx takes, when this was written.
PACKAGES = ("optimum-onnx==0.1.0", "transformers<4.58", "onnxruntime==1.32.0", "pillow")


def make(environment: Path, torch: str) -> Path:
    """The environment's Python; made, or made whole, where it cannot import what it is for."""
    python = environment / "bin" / "python"
    check = [python, "-c", "import onnxruntime, optimum.onnxruntime, PIL"]
    if python.exists() and not subprocess.run(check, check=False, capture_output=True).returncode:
        return python
    if environment.exists() and not (environment / "pyvenv.cfg").exists():
        sys.exit(f"{environment} is no virtual environment: name another with --environment")
    venv.create(environment, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", f"torch=={torch}", *PACKAGES]
    if subprocess.run(install, check=False).returncode:
        sys.exit(f"pip cannot install torch {torch} and {', '.join(PACKAGES)}; the same command tries again")
    return python


def load(exported: Path, files: list[Path]) -> None:
    """Runs in that environment. Raises: AssertionError: the logits are not those of ONNX Runtime."""
    import numpy as np
    import onnxruntime
    import optimum.version
    import transformers
    from optimum.onnxruntime import ORTModelForImageClassification
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in files]
    processor = transformers.AutoImageProcessor.from_pretrained(exported)
    model = ORTModelForImageClassification.from_pretrained(exported)
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    logits = model(pixel_values=pixels).logits.numpy()
    session = onnxruntime.InferenceSession(exported / "model.onnx", providers=["CPUExecutionProvider"])
    (alone,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
    np.testing.assert_array_equal(logits, alone)
    for file, answer in zip(files, logits.argmax(-1), strict=True):
        print(f"{file.name}: {model.config.id2label[int(answer)]}")
    print(
        f"optimum {optimum.version.__version__}, transformers {transformers.__version__}, onnxruntime "
        f"{onnxruntime.__version__}: logits of {len(files)} images equal to those of ONNX Runtime alone"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path, help="folder of `fliqs-hf export --to onnx`")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--environment", type=Path, default=Path("optimum-venv"))
    parser.add_argument("--torch", default="2.13.0", help="version to install there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        load(args.exported, args.images)
        return
    python = make(args.environment, args.torch)
    sys.exit(subprocess.run([python, __file__, *sys.argv[1:], "--inside"], check=False).returncode)


if __name__ == "__main__":
    main()
