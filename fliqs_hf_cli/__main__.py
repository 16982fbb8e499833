"""`python -m fliqs_hf_cli …`, and `accelerate launch -m fliqs_hf_cli search …` on several GPUs."""

import sys

from fliqs_hf_cli import main

sys.exit(main())
