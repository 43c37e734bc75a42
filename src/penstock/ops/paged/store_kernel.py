"""The kernels that write new keys and values to their slots."""

from __future__ import annotations

import triton
import triton.language as tl

#: Numbers of a token that a program codes.
LANES = 1024


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


@triton.jit
def e4m3(numbers, scales):  # type: ignore[no-untyped-def]
    """The codes, uint8, of float32 ``numbers`` in units of ``scales``: to the bit those of the codec fp8. In integers,
    as not every device that can read e4m3 has an instruction that rounds to it."""
    # `/` would be an approximation.
    quotient = tl.div_rn(numbers, scales)
    size, bits = tl.abs(quotient), quotient.to(tl.int32, bitcast=True)
    cut = tl.minimum(size, 448.0).to(tl.int32, bitcast=True)
    # 3 bits of the fraction stay, of a tie the even neighbour; exponents count from -7 instead of -127.
    normal = ((cut + 0x7FFFF + ((cut >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 all steps are 2^-9, which is the last bit of numbers from 2^14 on.
    small = (tl.minimum(size, 1.0) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
    code = tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    # What is infinite or not a number is not a number.
    return tl.where(size < float("inf"), code, 0x7F).to(tl.uint8)


@triton.jit  # type: ignore[untyped-decorator]
def store_fp8_kernel(  # type: ignore[no-untyped-def]
    query, key, value, scaled, memory, slots, scales,
    query_stride, key_stride, value_stride, block_size, query_width, width,
    groups: tl.constexpr, dim: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """One program for ``lanes`` numbers of a token: of its query, times the scales of keys, to ``scaled``
    [N, query_width], or of its key and its value, ``width`` numbers each, to memory uint8
    [blocks, 2, block_size, width]. ``scales`` float32 [2, width / dim] are those of keys and of values; ``groups``
    query heads share one."""
    token, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_query = tl.cdiv(query_width, lanes)
    if piece < of_query:
        lane = piece * lanes + tl.arange(0, lanes)
        inside = lane < query_width
        scale = tl.load(scales + lane // (groups * dim), inside, 1.0)
        numbers = tl.load(query + token * query_stride + lane, inside, 0.0).to(tl.float32) * scale
        tl.store(scaled + token * query_width + lane, numbers.to(scaled.dtype.element_ty), inside)
    else:
        lane = (piece - of_query) * lanes + tl.arange(0, lanes)
        inside = lane < width
        slot = tl.load(slots + token)
        target = memory + (slot // block_size * 2 * block_size + slot % block_size) * width + lane
        scale = tl.load(scales + lane // dim, inside, 1.0)
        numbers = tl.load(key + token * key_stride + lane, inside, 0.0).to(tl.float32)
        tl.store(target, e4m3(numbers, scale), inside)
        scale = tl.load(scales + (width + lane) // dim, inside, 1.0)
        numbers = tl.load(value + token * value_stride + lane, inside, 0.0).to(tl.float32)
        tl.store(target + block_size * width, e4m3(numbers, scale), inside)
