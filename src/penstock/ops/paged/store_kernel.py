"""The kernel that writes new keys and values to their slots."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def store_kernel(  # type: ignore[no-untyped-def]
    key, value, memory, slots, key_stride, value_stride, block_size, width, padded: tl.constexpr
):
    """One program a token: its key and its value, ``width`` numbers each, to memory [blocks, 2, block_size, width]."""
    token = tl.program_id(0)
    slot = tl.load(slots + token)
    block, offset = slot // block_size, slot % block_size
    lanes = tl.arange(0, padded)
    inside = lanes < width
    target = memory + (block * 2 * block_size + offset) * width + lanes
    tl.store(target, tl.load(key + token * key_stride + lanes, inside), inside)
    tl.store(target + block_size * width, tl.load(value + token * value_stride + lanes, inside), inside)
