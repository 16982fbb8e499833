"""`fliqs-hf search`: the recipe, `recipes/vit.py`."""

from __future__ import annotations

import argparse

from fliqs_hf.cli.output import pass_through
from fliqs_hf.pipeline.search import main

DESCRIPTION = """Find a mixed-precision model: fine-tune in fp32 if wanted, search formats, train for them, save.

    fliqs-hf search settings.yaml
    fliqs-hf search --model_name_or_path facebook/deit-tiny-patch16-224 --train_dir photos --finetune_steps 2000 \\
        --max_steps 2000 --target_bits 4 --output_dir runs/photos

A YAML file as the first argument sets any of the arguments below; the command line overrides it. --json prints the
results as JSON. On several GPUs: `accelerate launch -m fliqs_hf_cli search …`.
"""


def search(args: argparse.Namespace) -> int:
    return pass_through(args, lambda rest: main(rest, DESCRIPTION))
