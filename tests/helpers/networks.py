"""Layer lists of made-up networks, for tests that need shapes and no model."""

from __future__ import annotations

from fliqs_hf.cost import LayerInfo

#: Two transformer blocks in miniature: q, k and v of a block read one tensor.
BLOCKS = tuple(
    LayerInfo(f"blocks.{block}.{name}", "linear", macs * (block + 1), numel, 4, 10 * block + group)
    for block in range(2)
    for name, macs, numel, group in (("q", 70, 16, 0), ("k", 70, 16, 0), ("v", 90, 24, 0), ("mlp", 410, 64, 1))
)
#: Five unrelated layers whose sizes have no common factor, so that few allocations cost the same.
LONE = tuple(
    LayerInfo(f"layer{i}", "linear", macs, numel, 3, i)
    for i, (macs, numel) in enumerate(((101, 9), (230, 40), (57, 21), (499, 64), (313, 17)))
)
