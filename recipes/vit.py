"""Find a mixed-precision model: fine-tune in fp32 if wanted, search formats, train for them, evaluate, save.

    python recipes/vit.py recipes/configs/digits.yaml
    accelerate launch recipes/vit.py --model_name_or_path facebook/deit-tiny-patch16-224 --train_dir photos \\
        --finetune_steps 2000 --max_steps 2000 --target_bits 4 --output_dir runs/photos
    python recipes/vit.py recipes/configs/digits.yaml --target_bits 3 4 5      # a Pareto front
    python recipes/vit.py recipes/configs/digits.yaml --resume                 # after Ctrl-C

A YAML file as the first argument sets any of the arguments below; the command line overrides it. The steps themselves
are in `fliqs_hf/pipeline/search.py`: read it from `main` down.
"""

import sys

from fliqs_hf.pipeline.search import script

if __name__ == "__main__":
    sys.exit(script(description=__doc__))
