"""The kernel for products of rows with the matrices of experts in few bits, which it reads as they are stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.invariant_kernel import tile_of
from penstock.ops.multiprocessors import read_shared_memory
from penstock.ops.quantized.packed_kernel import MANY, TILES, Tile, bits_of, fitting, steps_of, sums


@triton.jit(do_not_specialize=["tiles"])  # type: ignore[untyped-decorator]
def grouped_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, offset, out, ends, tiles, height, size, stored, groups, down, along, last,
    kind: tl.constexpr, group: tl.constexpr, interleaved: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
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
    total = sums(
        x, values, scale, offset, token, own.to(tl.int64) * height + row, inside, there, size, stored, groups, down,
        along, 0, last, last, kind, group, interleaved, shifted, even, rows, tall, wide,
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
    return multiply(kind, x, values, scale, offset, ends, group, fitting(tile, kind, values, group))


def multiply(
    kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, ends: Tensor, group: int, tile: Tile
) -> Tensor:
    """:func:`product` by such tiles."""
    (count, size), experts = x.shape, len(ends)
    height, way = len(values) // experts, steps_of(kind, values, size, group, tile.depth)
    out = torch.empty(count, height, dtype=torch.bfloat16, device=x.device)
    tiles = min(count, triton.cdiv(count, tile.rows) + experts)
    grouped_kernel[(tiles * triton.cdiv(height, tile.height),)](
        x, values, scale, scale if offset is None else offset, out, ends, tiles,
        height, size, values.shape[1], scale.shape[1], *scale.stride(), way.last,
        kind, group, way.interleaved, offset is not None, way.even, tile.rows, tile.height, way.wide,
        experts, triton.next_power_of_2(experts), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
