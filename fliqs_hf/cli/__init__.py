"""What the commands of `fliqs-hf` do; their arguments are in `fliqs_hf_cli/`. Each returns the exit status."""

from transformers.utils import logging

logging.disable_progress_bar()  # of loading and saving, which takes no time here; long work has bars of its own
