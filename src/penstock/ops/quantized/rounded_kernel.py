"""Kernels for products of 8-bit floating point with itself: rows are rounded to it, and multiplied block by block."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.invariant_kernel import Tile
from penstock.ops.quantized.packed_kernel import processors

#: The largest number of e4m3, and the smallest scale: a row of zeros has one, too.
MOST, LEAST = 448.0, 1e-12

#: The larger, the less is read again; the first that keeps the device busy is taken.
TILES = (Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 4), Tile(64, 64, 128, 4, 4))


@triton.jit  # type: ignore[untyped-decorator]
def round_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, size, groups, group,
    most: tl.constexpr, least: tl.constexpr, padded: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """values float8_e4m3fn [N, size], each times its ``group``'s scale [N, groups], of x [N, size]: one program a row,
    ``padded`` groups of ``width`` columns side by side."""
    row = tl.program_id(0).to(tl.int64)
    part, lane = tl.arange(0, padded)[:, None], tl.arange(0, width)[None, :]
    at = part * group + lane
    inside = (part < groups) & (lane < group) & (at < size)
    own = tl.load(x + row * size + at, inside, 0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(own), 1) / most, least)
    found = own / factor[:, None]
    found = tl.minimum(tl.maximum(found, -most), most)
    tl.store(values + row * size + at, found.to(tl.float8e4nv), inside)
    places = tl.arange(0, padded)
    tl.store(scale + row * groups + places, factor, places < groups)


def rounded(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    """``x`` [N, K], contiguous, as float8_e4m3fn [N, K], and the scale float32 [N, k] of each ``group`` of columns
    (None: of each row): what takes the largest number to the largest of e4m3."""
    count, size = x.shape
    width = size if group is None else group
    groups = triton.cdiv(size, width)
    values = torch.empty(count, size, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(count, groups, dtype=torch.float32, device=x.device)
    padded = triton.next_power_of_2(groups), triton.next_power_of_2(width)
    warps = 4 if padded[0] * padded[1] <= 4096 else 8 if padded[0] * padded[1] <= 8192 else 16
    round_kernel[(count,)](x, values, scale, size, groups, width, MOST, LEAST, *padded, num_warps=warps)
    return values, scale


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def blocks_kernel(  # type: ignore[no-untyped-def]
    x, x_scale, values, scale, out, count, height, size, groups, group,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
):  # fmt: skip
    """out [count, height] = x times the transpose of values, both e4m3 [.., size], each times its group's scale
    [.., groups]; one program for a tile of the result. Matrix units add up within ``depth`` columns alone, as they keep
    few bits of sums of e4m3, and the sums of groups are added in float32."""
    row, column = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * columns + tl.arange(0, columns)
    lane, inside_rows, inside_columns = tl.arange(0, depth), row < count, column < height
    line, over = row.to(tl.int64), column.to(tl.int64)
    from_x = x + line[:, None] * size + lane[None, :]
    from_values = values + over[None, :] * size + lane[:, None]
    total = tl.zeros((rows, columns), tl.float32)
    for at in range(0, size, depth):
        inside = at + lane < size
        a = tl.load(from_x + at, inside_rows[:, None] & inside[None, :], 0.0)
        b = tl.load(from_values + at, inside_columns[None, :] & inside[:, None], 0.0)
        own = tl.load(x_scale + line * groups + at // group, inside_rows, 0.0)
        other = tl.load(scale + over * groups + at // group, inside_columns, 0.0)
        total += tl.dot(a, b) * own[:, None] * other[None, :]
    to = out + line[:, None] * height + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), inside_rows[:, None] & inside_columns[None, :])


def blocks(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, group: int) -> Tensor:
    """bfloat16 [N, M] of ``x`` float8_e4m3fn [N, K] and ``values`` float8_e4m3fn [M, K], with scales float32 [.., k] of
    each ``group`` of columns; all contiguous."""

    def programs(tile: Tile) -> int:
        found: int = triton.cdiv(x.shape[0], tile.rows) * triton.cdiv(values.shape[0], tile.columns)
        return found

    busy = (tile for tile in TILES if programs(tile) >= processors(x.device))
    return multiply(x, x_scale, values, scale, group, next(busy, TILES[-1]))


def multiply(x: Tensor, x_scale: Tensor, values: Tensor, scale: Tensor, group: int, tile: Tile) -> Tensor:
    """:func:`blocks` by such tiles."""
    (count, size), height, depth = x.shape, values.shape[0], math.gcd(group, tile.depth)
    out = torch.empty(count, height, dtype=torch.bfloat16, device=x.device)
    blocks_kernel[(triton.cdiv(count, tile.rows), triton.cdiv(height, tile.columns))](
        x, x_scale, values, scale, out, count, height, size, scale.shape[1], group, tile.rows, tile.columns, depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
