"""The kernel that makes plain numbers of a matrix in few bits, for products with so many rows that a library's are the
faster ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.quantized.packed_kernel import bits_of, floats, integers, quarters

#: What a program decodes: so many rows, and in each so many stretches of columns, which are as wide as what a thread
#: writes at once, have one scale, and so have it read once.
ROWS, STRETCHES, WIDE = 2, 128, 8


@triton.jit
def valued(raw, factor, added):  # type: ignore[no-untyped-def]
    """The numbers that stored ones stand for."""
    return (raw.to(tl.float32) * factor + added).to(tl.bfloat16)


@triton.jit  # type: ignore[untyped-decorator]
def plain_kernel(  # type: ignore[no-untyped-def]
    values, scale, offset, out, height, width, down, along,
    group: tl.constexpr, together: tl.constexpr, table: tl.constexpr, shifted: tl.constexpr,
    rows: tl.constexpr, stretches: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """out [height, width * together] of values [height, width], where ``together`` numbers are in one: in 4 bits, two
    in a uint8 or four in a uint16. The scale of the next row is ``down`` from there, and that of the next ``group`` of
    columns ``along``; numbers in 4 bits are e2m1 where there is a ``table``. One program for a tile: ``stretches`` of
    ``wide`` values."""
    row = (tl.program_id(0) * rows + tl.arange(0, rows))[:, None, None]
    first = (tl.program_id(1) * stretches + tl.arange(0, stretches))[None, :, None] * wide
    line, at = row.to(tl.int64), first + tl.arange(0, wide)[None, None, :]
    raw = tl.load(values + line * width + at, (row < height) & (at < width), 0.0)
    place = line * down + (first * together // group).to(tl.int64) * along
    factor = tl.load(scale + place, (row < height) & (first < width), 0.0)
    added = tl.zeros_like(factor)
    if shifted:
        added += tl.load(offset + place, (row < height) & (first < width), 0.0)
    if together == 4:
        if table:
            a, b, c, d = floats(raw), floats(raw >> 4), floats(raw >> 8), floats(raw >> 12)
        else:
            a, b, c, d = quarters(raw)
        even = tl.interleave(valued(a, factor, added), valued(c, factor, added))
        number = tl.interleave(even, tl.interleave(valued(b, factor, added), valued(d, factor, added)))
    elif together == 2:
        if table:
            low, high = floats(raw), floats(raw >> 4)
        else:
            low, high = integers(raw & 15), integers(raw >> 4)
        number = tl.interleave(valued(low, factor, added), valued(high, factor, added))
    else:
        number = valued(raw, factor, added)
    column = first * together + tl.arange(0, wide * together)[None, None, :]
    tl.store(out + line * width * together + column, number, (row < height) & (column < width * together))


def plain(kind: str, values: Tensor, scale: Tensor, offset: Tensor | None, group: int, size: int) -> Tensor:
    """The matrix bfloat16 [M, ``size``] of its parts, as of :func:`~penstock.ops.quantized.packed_kernel.product`."""
    height, together = values.shape[0], 1
    if bits_of(kind) == 4:
        together = 4 if size % 4 == 0 else 2
        values = values.view(torch.uint16) if together == 4 else values
    out = torch.empty(height, size, dtype=torch.bfloat16, device=values.device)
    plain_kernel[(triton.cdiv(height, ROWS), triton.cdiv(size, STRETCHES * WIDE))](
        values, scale, scale if offset is None else offset, out, height, values.shape[1], *scale.stride(),
        group, together, kind == "e2m1", offset is not None, ROWS, STRETCHES, WIDE // together, num_warps=4,
    )  # fmt: skip
    return out
