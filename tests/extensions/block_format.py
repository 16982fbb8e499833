"""FP4 in blocks of 8 with BF16 scales."""

from fliqs_hf.formats import BlockFormat, FloatFormat, register_format

register_format(BlockFormat("fp4_g8", FloatFormat(2, 1), block=8, scale="bf16"))
