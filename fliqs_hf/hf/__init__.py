"""Integration with Transformers and the Hub. Importing it registers the quantization method "fliqs"."""

from fliqs_hf.hf.config import FLIQSConfig
from fliqs_hf.hf.fold import fold_batchnorm
from fliqs_hf.hf.quantizer import FLIQSHfQuantizer, quantize

__all__ = ["FLIQSConfig", "FLIQSHfQuantizer", "fold_batchnorm", "quantize"]
