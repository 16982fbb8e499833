"""Where a model and its optimizer live while they are trained, one file each."""

from fliqs_hf.training.backends.choice import backend_for, check_support
from fliqs_hf.training.backends.plain import Backend
from fliqs_hf.training.backends.zero_settings import load_models_whole

__all__ = ["Backend", "backend_for", "check_support", "load_models_whole"]
