"""Compare ways of choosing formats: `fliqs-hf compare`, from a checkout. `--help` lists the methods."""

import sys

from fliqs_hf.pipeline.compare import script

if __name__ == "__main__":
    sys.exit(script(sys.argv[1:], "python recipes/bench/compare.py"))
