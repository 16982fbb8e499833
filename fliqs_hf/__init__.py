"""Mixed-precision quantization search for Hugging Face vision transformers.

Importing this package registers the quantization method "fliqs" with Transformers.
"""

from fliqs_hf.allocation import Allocation, LayerFormats
from fliqs_hf.formats import parse
from fliqs_hf.hf import FLIQSConfig, quantize
from fliqs_hf.nn import make_searchable
from fliqs_hf.version import __version__

__all__ = ["Allocation", "FLIQSConfig", "LayerFormats", "__version__", "make_searchable", "parse", "quantize"]
