"""Kernels for CUDA devices whose bits for a row do not depend on the other rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows, columns and depth of a product's tile, the same for every number of rows: the bits of a row depend on it.
ROWS, COLUMNS, DEPTH = 64, 64, 64


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, ends, count, height, size,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
    groups: tl.constexpr, groups_padded: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    """out [count, height] = x [count, size] times the transpose of weight [height, size]; or, of several ``groups``,
    the rows up to ends[g] times that of weight[g]. One program for a tile of the result; sums go over ``size`` in order.
    Programs beside each other have the same part of the weight."""
    tile, column = tl.program_id(0), tl.program_id(1) * columns + tl.arange(0, columns)
    if groups:
        group = tl.arange(0, groups_padded)
        stop = tl.load(ends + group, group < groups, 0)
        start = tl.load(ends + group - 1, (group > 0) & (group < groups), 0)
        tiles = tl.where(group < groups, tl.cdiv(stop - start, rows), 0)
        reached = tl.cumsum(tiles, 0)
        own = tl.sum((reached <= tile).to(tl.int32), 0)
        if own >= groups:
            return
        first = tl.sum(tl.where(group == own, start + (tile - (reached - tiles)) * rows, 0), 0)
        behind = tl.sum(tl.where(group == own, stop, 0), 0)
        weight += own.to(tl.int64) * height * size
    else:
        first, behind = tile * rows, count
    row, lane = first + tl.arange(0, rows), tl.arange(0, depth)
    from_x = x + row.to(tl.int64)[:, None] * size + lane[None, :]
    from_weight = weight + column.to(tl.int64)[None, :] * size + lane[:, None]
    inside_rows, inside_columns = (row < behind)[:, None], (column < height)[None, :]
    total = tl.zeros((rows, columns), tl.float32)
    for at in range(0, size, depth):
        a = tl.load(from_x + at, inside_rows & (at + lane < size)[None, :], 0.0)
        b = tl.load(from_weight + at, inside_columns & (at + lane < size)[:, None], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if biased:
        total += tl.load(bias + column, column < height, 0.0).to(tl.float32)[None, :]
    to = out + row.to(tl.int64)[:, None] * height + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), inside_rows & inside_columns)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None = None) -> Tensor:
    """[N, M] from ``x`` [N, K] and ``weight`` [M, K], or [G, M, K] with the ``ends`` int32 [G] of the groups of rows,
    and ``bias`` [M]; all contiguous."""
    (count, size), height = x.shape, weight.shape[-2]
    groups = 0 if ends is None else len(ends)
    out = torch.empty((count, height), dtype=x.dtype, device=x.device)
    narrow = x.dtype.itemsize < 4
    product_kernel[(triton.cdiv(count, ROWS) + groups, triton.cdiv(height, COLUMNS))](
        x, weight, x if bias is None else bias, out, x if ends is None else ends, count, height, size,
        ROWS, COLUMNS, DEPTH if narrow else DEPTH // 2, groups, triton.next_power_of_2(groups) if groups else 1,
        bias is not None, num_warps=4, num_stages=4 if narrow else 2,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def norm_kernel(x, weight, out, step, size, eps, padded: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program a row: over its root mean square, times the weight."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    inside = lane < size
    own = tl.load(x + row * step + lane, inside, 0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(own * own, 0) / size + eps)
    scaled = own * factor * tl.load(weight + lane, inside, 0.0).to(tl.float32)
    tl.store(out + row * size + lane, scaled.to(out.dtype.element_ty), inside)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [N, K], whose rows are contiguous, normed by root-mean-square and scaled by ``weight`` [K]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[1]
    padded = triton.next_power_of_2(size)
    norm_kernel[(x.shape[0],)](x, weight, out, x.stride(0), size, eps, padded, num_warps=8 if padded > 2048 else 4)
    return out
