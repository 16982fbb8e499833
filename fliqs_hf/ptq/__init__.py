"""Post-training quantization beyond rounding to nearest, for any allocation, from a few unlabelled images."""

from fliqs_hf.ptq.calibration import Rounding, calibrate
from fliqs_hf.ptq.gain import rounding_gain
from fliqs_hf.ptq.gptq import gptq_round, input_hessian
from fliqs_hf.ptq.ranges import static_scale
from fliqs_hf.ptq.rotation import rotate

__all__ = ["Rounding", "calibrate", "gptq_round", "input_hessian", "rotate", "rounding_gain", "static_scale"]
