"""The kernel that makes plain numbers of a matrix in few bits, for products with so many rows that a library's are the
faster ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.quantized.nibbles import PLANE, columns_of
from penstock.ops.quantized.packed_kernel import bits_of, floats, four_floats, four_integers, integers

#: What a program decodes: so many rows, and in each so many stretches of columns, which are as wide as what a thread
#: writes at once, have one scale, and so have it read once; and blocks of numbers that are interleaved.
ROWS, STRETCHES, WIDE, BLOCKS = 2, 128, 8, 8


@triton.jit
def valued(raw, factor, added):  # type: ignore[no-untyped-def]
    """The numbers that stored ones stand for."""
    return (raw.to(tl.float32) * factor + added).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def straight_kernel(  # type: ignore[no-untyped-def]
    values, scale, offset, out, height, width, down, along,
    group: tl.constexpr, kind: tl.constexpr, pair: tl.constexpr, shifted: tl.constexpr,
    rows: tl.constexpr, stretches: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """out [height, width * pair] of values [height, width], of which each is one number, or in 4 bits a ``pair``. The
    scale of the next row is ``down`` from there, and that of the next ``group`` of columns ``along``. One program for a
    tile: ``stretches`` of ``wide`` values."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None, None]
    first = (tl.program_id(1) * stretches + tl.arange(0, stretches))[None, :, None] * wide
    line, at = row.to(tl.int64), first + tl.arange(0, wide)[None, None, :]
    raw = tl.load(values + line * width + at, (row < height) & (at < width), 0.0)
    place = line * down + (first * pair // group).to(tl.int64) * along
    factor = tl.load(scale + place, (row < height) & (first < width), 0.0)
    added = tl.zeros_like(factor)
    if shifted:
        added += tl.load(offset + place, (row < height) & (first < width), 0.0)
    if pair == 1:
        number = valued(raw, factor, added)
    else:
        if kind == "int4":
            low, high = integers(raw & 15), integers(raw >> 4)
        else:
            low, high = floats(raw), floats(raw >> 4)
        number = tl.interleave(valued(low, factor, added), valued(high, factor, added))
    column = first * pair + tl.arange(0, wide * pair)[None, None, :]
    tl.store(out + line * width * pair + column, number, (row < height) & (column < width * pair))


@triton.jit  # type: ignore[untyped-decorator]
def interleaved_kernel(  # type: ignore[no-untyped-def]
    values, scale, offset, out, height, stored, first, count, down, along,
    group: tl.constexpr, kind: tl.constexpr, shifted: tl.constexpr,
    rows: tl.constexpr, blocks: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """The same of values [height, stored] that are four interleaved numbers each: of ``count`` blocks of ``wide``
    values, from the value ``first`` of a row on; one program for some of them."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None, None]
    block = (tl.program_id(1) * blocks + tl.arange(0, blocks))[None, :, None]
    line, lane = row.to(tl.int64), tl.arange(0, wide)[None, None, :]
    inside = (row < height) & (block < count)
    raw = tl.load(values + line * stored + first + block * wide + lane, inside, 0)
    if kind == "int4":
        numbers = four_integers(raw)
    else:
        numbers = four_floats(raw)
    for plane in tl.static_range(4):
        column = 4 * first + (4 * block + plane) * wide
        place = line * down + (column // group).to(tl.int64) * along
        factor = tl.load(scale + place, inside, 0.0)
        added = tl.zeros_like(factor)
        if shifted:
            added += tl.load(offset + place, inside, 0.0)
        tl.store(out + line * stored * 4 + column + lane, valued(numbers[plane], factor, added), inside)


def plain(kind: str, values: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """The matrix bfloat16 [M, K] of its parts, as of :func:`~penstock.ops.quantized.packed_kernel.product`."""
    (height, width), added = values.shape, scale if offset is None else offset
    four = bits_of(kind) == 4
    out = torch.empty(height, columns_of(values) if four else width, dtype=torch.bfloat16, device=values.device)
    if values.dtype == torch.int16:
        whole, half = divmod(width, PLANE)
        for first, count, wide in ((0, whole, PLANE), (whole * PLANE, bool(half), PLANE // 2)):
            if count:
                interleaved_kernel[(triton.cdiv(height, ROWS), triton.cdiv(count, BLOCKS))](
                    values, scale, added, out, height, width, first, int(count), *scale.stride(),
                    group, kind, offset is not None, ROWS, BLOCKS, wide, num_warps=4,
                )  # fmt: skip
        return out
    pair = 2 if four else 1
    straight_kernel[(triton.cdiv(height, ROWS), triton.cdiv(width * pair, STRETCHES * WIDE))](
        values, scale, added, out, height, width, *scale.stride(),
        group, kind, pair, offset is not None, ROWS, STRETCHES, WIDE // pair, num_warps=4,
    )  # fmt: skip
    return out
