"""The kernel for products of rows with the matrices of experts in few bits, which it reads as they are stored."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.invariant_kernel import tile_of
from penstock.ops.multiprocessors import read_shared_memory, stages
from penstock.ops.quantized.packed_kernel import MANY, TILES, Tile, bits_of, sums, together


@triton.jit(do_not_specialize=["tiles"])  # type: ignore[untyped-decorator]
def grouped_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, offset, out, ends, tiles, height, width, groups, down, along, each, steps,
    together: tl.constexpr, table: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr, experts: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """out [N, height], of rows x that are sorted by expert and end at ``ends`` [experts], each times the transpose of
    its expert's rows of the matrix [experts * height, size]; see :func:`~.packed_kernel.sums` for how that is stored.
    One program for a tile of the result; an expert without rows has none, and is not read."""
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    own, first, stop = tile_of(ends, tile, rows, experts, padded)
    if own >= experts:
        return
    row, token = block * tall + tl.arange(0, tall), first + tl.arange(0, rows)
    inside, there = row < height, token < stop
    line, lane = own.to(tl.int64) * height + row, tl.arange(0, wide)
    from_values = values + line[:, None] * width + lane[None, :]
    from_x = x + token.to(tl.int64)[None, :] * width + lane[:, None]
    total = sums(
        from_x, from_values, scale, offset, line, inside, there, width, groups, down, along, each,
        0, steps, together, table, shifted, even, rows, tall, wide,
    )  # fmt: skip
    to = out + token.to(tl.int64)[None, :] * height + row[:, None]
    tl.store(to, total.to(out.dtype.element_ty), inside[:, None] & there[None, :])


def product(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, ends: Tensor, group: int
) -> Tensor:
    """``x`` bfloat16 [N, K], sorted by expert, each row times the transpose of its expert's matrix: bfloat16 [N, M].
    Products are exact and sums float32. A matrix is decoded once for each tile of rows of its expert.

    Args:
        kind, values, scale, offset, group: as of :func:`~penstock.ops.quantized.packed_kernel.product`, of all matrices
            one below the other.
        ends: int32 [E], where the rows of each expert end.
    """
    average = -(-len(x) // len(ends))
    of_bits = TILES[bits_of(kind)]
    largest = MANY if read_shared_memory(x.device) else of_bits[-1][1]
    tile = next((tile for most, tile in of_bits if average <= most), largest)
    stage = math.gcd(group, tile.depth) * (2 * tile.rows + bits_of(kind) * tile.height // 8)
    return multiply(
        kind, x, values, scale, offset, ends, group, tile._replace(stages=stages(x.device, tile.stages, stage))
    )


def multiply(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, ends: Tensor, group: int, tile: Tile
) -> Tensor:
    """:func:`product` by such tiles."""
    (count, size), experts, depth = x.shape, len(ends), math.gcd(group, tile.depth)
    height, steps = len(values) // experts, triton.cdiv(size, depth)
    out = torch.empty(count, height, dtype=torch.bfloat16, device=x.device)
    tiles = min(count, triton.cdiv(count, tile.rows) + experts)
    x, values, in_one = together(kind, x, values, depth)
    grouped_kernel[(tiles * triton.cdiv(height, tile.height),)](
        x, values, scale, scale if offset is None else offset, out, ends, tiles,
        height, values.shape[1], scale.shape[1], *scale.stride(), group // depth, steps,
        in_one, kind == "e2m1", offset is not None, size == steps * depth,
        tile.rows, tile.height, depth // in_one, experts, triton.next_power_of_2(experts),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
