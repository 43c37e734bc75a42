"""Kernels for CUDA devices whose bits for a row do not depend on the other rows."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.multiprocessors import processors


class Tile(NamedTuple):
    """What a program of a product works on: rows and columns of the result, and how much of each sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: For up to so many rows, where it matters how fast the weight is read, of a narrow weight and of a wide one; and for
#: more. Measured on an H200. Matrix units add up in the same order in all of them, which is checked on each device.
NARROW, WIDE, MANY = Tile(64, 32, 128, 4, 5), Tile(64, 64, 128, 4, 4), Tile(128, 128, 64, 8, 3)

#: For float32, which no matrix unit multiplies exactly.
EXACT = Tile(64, 64, 32, 4, 2)


@triton.jit  # type: ignore[untyped-decorator]
def tile_of(  # type: ignore[no-untyped-def]
    ends, tile, rows: tl.constexpr, groups: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    """Which expert the ``tile`` of so many rows belongs to, its first row, and where the expert's rows end; ``groups``
    for a tile behind the last."""
    group = tl.arange(0, padded)
    stop = tl.load(ends + group, group < groups, 0)
    start = tl.load(ends + group - 1, (group > 0) & (group < groups), 0)
    tiles = tl.where(group < groups, (stop - start + rows - 1) // rows, 0)
    reached = tl.cumsum(tiles, 0)
    own = tl.sum((reached <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(group == own, start + (tile - (reached - tiles)) * rows, 0), 0)
    return tl.where(own < groups, own, groups), first, tl.sum(tl.where(group == own, stop, 0), 0)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, out, ends, count, height, size,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
    groups: tl.constexpr, groups_padded: tl.constexpr, biased: tl.constexpr,
):  # fmt: skip
    """out [count, height] = x [count, size] times the transpose of weight [height, size]; or, of several ``groups``,
    the rows up to ends[g] times that of weight[g]. One program for a tile of the result; sums go over ``size`` in
    order. Programs beside each other have the same part of the weight."""
    tile, column = tl.program_id(0), tl.program_id(1) * columns + tl.arange(0, columns)
    if groups:
        own, first, behind = tile_of(ends, tile, rows, groups, groups_padded)
        if own >= groups:
            return
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
    return multiply(x, weight, bias, ends, _tile(x, weight, 1 if ends is None else len(ends)))


def _tile(x: Tensor, weight: Tensor, groups: int) -> Tile:
    if x.dtype.itemsize > 2:
        return EXACT
    if not tiles_agree(x.device, x.dtype):
        return WIDE
    if x.shape[0] > NARROW.rows * groups:
        return MANY
    return NARROW if weight.shape[-2] <= NARROW.columns * processors(x.device) else WIDE


@functools.cache
def tiles_agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product has the same bits by all tiles: their choice may depend on the number of rows then."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(count, 5000, generator=draw).to(device, dtype) for count in (200, 400))
    found = [multiply(x, weight, None, None, tile) for tile in (NARROW, WIDE, MANY)]
    return all(torch.equal(found[0], other) for other in found[1:])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor | None, tile: Tile) -> Tensor:
    """:func:`product` by such tiles."""
    (count, size), height = x.shape, weight.shape[-2]
    groups = 0 if ends is None else len(ends)
    out = torch.empty((count, height), dtype=x.dtype, device=x.device)
    product_kernel[(triton.cdiv(count, tile.rows) + groups, triton.cdiv(height, tile.columns))](
        x, weight, x if bias is None else bias, out, x if ends is None else ends, count, height, size,
        tile.rows, tile.columns, tile.depth, groups, triton.next_power_of_2(groups) if groups else 1, bias is not None,
        num_warps=tile.warps, num_stages=tile.stages,
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
