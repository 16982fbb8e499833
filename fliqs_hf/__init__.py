"""Mixed-precision quantization search for Hugging Face vision transformers.

Importing this package registers the quantization method "fliqs" with Transformers.
"""

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.formats import parse
from fliqs_hf.hf import FLIQSConfig, quantize
from fliqs_hf.nn import make_searchable

__version__ = "0.1.0.dev0"

__all__ = ["Allocation", "FLIQSConfig", "LayerFormats", "make_searchable", "parse", "quantize"]
