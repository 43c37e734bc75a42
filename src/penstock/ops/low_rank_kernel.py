"""Kernels that add low-rank products to rows, each those of its own adapter: a batch reads the adapters that it has,
and each of them for its own rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.devices import lasting
from penstock.ops.experts_kernel import ordered
from penstock.ops.invariant_kernel import tile_of


class Tiles(NamedTuple):
    """What programs work on: so many rows of an adapter, how much of a sum at a time with how many warps, and how many
    columns of what is added with how many."""

    rows: int
    depth: int
    narrow_warps: int
    stages: int
    columns: int
    wide_warps: int


#: Where there are no more rows than adapters, of few rows an adapter, and of more. Measured on an H200, for the
#: matrices of Qwen3-8B and rank 16.
ONE, FEW, MANY = Tiles(16, 128, 2, 4, 1024, 4), Tiles(16, 128, 2, 4, 256, 4), Tiles(64, 64, 4, 3, 128, 4)
#: Bytes of A and of B that a program has at a time at most.
ROOM = 1 << 15


@triton.jit  # type: ignore[untyped-decorator]
def tiles_kernel(  # type: ignore[no-untyped-def]
    order, ends, tiles, rows: tl.constexpr, groups: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    """Of each tile, its adapter, its first row in ``order``, where the adapter's rows end, and which row the first is:
    tiles [count, 4]; the adapter is 0 of those without one, and of those behind the last."""
    tile = tl.program_id(0)
    own, first, stop = tile_of(ends, tile, rows, groups, padded)
    tl.store(tiles + 4 * tile, tl.where(own < groups, own, 0))
    tl.store(tiles + 4 * tile + 1, first)
    tl.store(tiles + 4 * tile + 2, stop)
    tl.store(tiles + 4 * tile + 3, tl.load(order + first))


@triton.jit(do_not_specialize=["many", "count", "pieces", "slots"])  # type: ignore[untyped-decorator]
def narrow_kernel(  # type: ignore[no-untyped-def]
    x, a, inner, order, tiles, many, count, pieces, slots, width, size,
    rank: tl.constexpr, rows: tl.constexpr, depth: tl.constexpr, splits: tl.constexpr,
):  # fmt: skip
    """inner float32 [splits, pieces, count, width], in ``order``: what parts of the sums over x [count, size] give for
    the A of each row's adapter, a [pieces, slots, width, size]."""
    tile, rest = tl.program_id(0) % many, tl.program_id(0) // many
    piece, split = rest % pieces, rest // pieces
    own, first, stop = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1), tl.load(tiles + 4 * tile + 2)
    if own == 0:
        return
    row, lane, column = first + tl.arange(0, rows), tl.arange(0, depth), tl.arange(0, rank)
    inside_rows, inside_columns = (row < stop)[:, None], (column < width)[None, :]
    token = tl.load(order + row, row < stop, 0)
    from_x = x + token.to(tl.int64)[:, None] * size + lane[None, :]
    matrix = (piece * slots + own - 1).to(tl.int64) * width * size
    from_a = a + matrix + column.to(tl.int64)[None, :] * size + lane[:, None]
    total = tl.zeros((rows, rank), tl.float32)
    for at in range(split * depth, size, splits * depth):
        inside = at + lane < size
        given = tl.load(from_x + at, inside_rows & inside[None, :], 0.0)
        total = tl.dot(
            given, tl.load(from_a + at, inside_columns & inside[:, None], 0.0), total, input_precision="ieee"
        )
    to = inner + ((split * pieces + piece).to(tl.int64) * count + row)[:, None] * width + column[None, :]
    tl.store(to, total, inside_rows & inside_columns)


@triton.jit  # type: ignore[untyped-decorator]
def widen_one(  # type: ignore[no-untyped-def]
    out, inner, given, column, end, apart, width, rank: tl.constexpr, splits: tl.constexpr
):  # fmt: skip
    """:func:`widen_kernel` of one row, whose parts in ``inner`` are so far ``apart``, and to whose ``column`` the B
    that is ``given`` adds."""
    lane, split = tl.arange(0, rank), tl.arange(0, splits)
    at = split.to(tl.int64)[:, None] * apart + lane[None, :]
    narrow = tl.sum(tl.load(inner + at, (lane < width)[None, :], 0.0), 0)
    total = tl.load(out + column, column < end, 0.0).to(tl.float32)
    total += tl.sum(narrow[:, None] * given.to(tl.float32), 0)
    tl.store(out + column, total.to(out.dtype.element_ty), column < end)


@triton.jit(do_not_specialize=["many", "count", "pieces"])  # type: ignore[untyped-decorator]
def widen_kernel(  # type: ignore[no-untyped-def]
    out, step, inner, blocks, order, tiles, many, count, pieces, width,
    rank: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, splits: tl.constexpr, unit: tl.constexpr,
):  # fmt: skip
    """out [count, ...], a row of which is ``step`` numbers behind the last, += what the B of each row's adapter make of
    ``inner``, one program for a tile of rows and a block of columns. Of each block, ``blocks`` int64 [..., 5] has its
    first column, the first one of its piece and the one behind the last, which are multiples of ``unit``, where the
    piece's B [slots, width, its columns] lie, and which piece it is."""
    tile, block = tl.program_id(0) % many, blocks + tl.program_id(0) // many * 5
    own, first, stop = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1), tl.load(tiles + 4 * tile + 2)
    # Who knows that these are multiples reads several numbers at a time.
    start, begin = tl.multiple_of(tl.load(block), unit), tl.multiple_of(tl.load(block + 1), unit)
    end, address, piece = tl.multiple_of(tl.load(block + 2), unit), tl.load(block + 3), tl.load(block + 4)
    head = tl.load(tiles + 4 * tile + 3).to(tl.int64)
    if own == 0:
        return
    kind = out.dtype.element_ty
    column, lane = start + tl.arange(0, columns), tl.arange(0, rank)
    inside_columns, inside_rank = (column < end)[None, :], lane < width
    # What is read waits for nothing else that is: a program has little to read, and each wait is as long as that.
    b = tl.multiple_of(address.to(tl.pointer_type(kind)), 16)
    line = ((own - 1) * width + lane).to(tl.int64) * (end - begin)
    given = tl.load(b + line[:, None] + (column - begin)[None, :], inside_rank[:, None] & inside_columns, 0.0)
    apart = pieces.to(tl.int64) * count * width
    from_inner = inner + (piece * count + first) * width
    if stop - first == 1:
        widen_one(out + head * step, from_inner, given, column, end, apart, width, rank, splits)
        return
    own_row = tl.arange(0, rows)
    row = first + own_row
    inside_rows = row < stop
    token = tl.load(order + row, inside_rows, 0)
    at = out + token.to(tl.int64)[:, None] * step + column[None, :]
    total = tl.load(at, inside_rows[:, None] & inside_columns, 0.0).to(tl.float32)
    narrow = tl.zeros((rows, rank), tl.float32)
    for split in tl.static_range(splits):
        part = from_inner + split * apart + own_row[:, None] * width + lane[None, :]
        narrow += tl.load(part, inside_rows[:, None] & inside_rank[None, :], 0.0)
    total = tl.dot(narrow.to(kind), given, total, input_precision="ieee")
    tl.store(at, total.to(kind), inside_rows[:, None] & inside_columns)


def sorted_tiles(owners: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The rows by their slots ``owners`` int64 [N], of so many ``groups`` with that of those without, as int32 [N]; and
    the tiles that they make, int32 [N, 4], as of :func:`tiles_kernel`."""
    order, _, ends = ordered(owners, groups)
    tiles = torch.empty(len(owners), 4, dtype=torch.int32, device=owners.device)
    if len(owners):
        rows, many = _tiling(len(owners), groups)
        tiles_kernel[(many,)](order, ends, tiles, rows.rows, groups, triton.next_power_of_2(groups), num_warps=1)
    return order, tiles


def _tiling(count: int, groups: int) -> tuple[Tiles, int]:
    """How large tiles of so many rows in ``groups`` are, and how many there are at most."""
    tile = ONE if count <= groups else FEW if count <= FEW.rows * groups else MANY
    return tile, min(count, triton.cdiv(count, tile.rows) + groups)


def narrow(inner: Tensor, x: Tensor, order: Tensor, tiles: Tensor, a: Tensor) -> None:
    """Writes to ``inner`` float32 [splits, pieces, N, width], in so many parts of a sum, what the A of each row's
    adapter, ``a`` [pieces, slots, width, size], makes of contiguous ``x`` [N, size]. The rows are in ``order`` and make
    ``tiles``, as of :func:`sorted_tiles`."""
    splits, (count, size), (pieces, slots, width, _) = len(inner), x.shape, a.shape
    if not count:
        return
    rank, (tile, many) = _padded(width), _tiling(count, slots + 1)
    depth = max(16, min(tile.depth, ROOM // (rank * a.itemsize)))
    narrow_kernel[(many * pieces * splits,)](
        x, a, inner, order, tiles, many, count, pieces, slots, width, size,
        rank=rank, rows=tile.rows, depth=depth, splits=splits, num_warps=tile.narrow_warps, num_stages=tile.stages,
    )  # fmt: skip


def widen(out: Tensor, inner: Tensor, order: Tensor, tiles: Tensor, b: Sequence[Tensor], begins: Sequence[int]) -> None:
    """Adds to ``out`` [N, height] what the B of each row's adapter make of ``inner``, as :func:`narrow` left it. Of
    each piece there is B, [slots, width, its columns], and where its columns begin."""
    splits, pieces, count, width = inner.shape
    if not count:
        return
    rank, (tile, many) = _padded(width), _tiling(count, len(b[0]) + 1)
    columns = max(16, min(tile.columns, ROOM // (rank * out.itemsize)))
    widths = [each.shape[2] for each in b]
    blocks = _blocks(tuple(each.data_ptr() for each in b), tuple(begins), tuple(widths), columns, out.device)
    widen_kernel[(many * len(blocks),)](
        out, out.stride(0), inner, blocks, order, tiles, many, count, pieces, width,
        rank=rank, rows=tile.rows, columns=columns, splits=splits, unit=math.gcd(16, columns, *begins, *widths),
        num_warps=tile.wide_warps,
    )  # fmt: skip


def _padded(width: int) -> int:
    """Of so many rows of A, how many a program has: matrix units multiply no fewer than 16."""
    return max(16, 1 << (width - 1).bit_length())


@lasting
def _blocks(
    addresses: tuple[int, ...], begins: tuple[int, ...], widths: tuple[int, ...], columns: int, device: torch.device
) -> Tensor:
    """The blocks of so many columns that pieces have, as of :func:`widen_kernel`."""
    rows = [
        (start, begin, begin + width, address, piece)
        for piece, (begin, width, address) in enumerate(zip(begins, widths, addresses, strict=True))
        for start in range(begin, begin + width, columns)
    ]
    return torch.tensor(rows, dtype=torch.int64).to(device)
