"""Kernels for a mixture of experts on CUDA: choosing, ordering, the two products, and adding up.

Decoding reads the weights of all experts that are chosen, for a few rows each; so what counts is how fast they are
read, and that nothing stands between. Every sum is added up in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.ops.invariant_kernel import Tile, tile_of
from penstock.ops.multiprocessors import stages

#: Assignments that are looked at together while they are ordered, and those of a warp, of which there are 8 at least.
PIECE, OWN = 8192, 256

#: Numbers of a token that a program adds up.
COLUMNS = 1024

#: By how many rows an expert has on average, at most: tiles for gate and up, and for down. Measured on an H200, for the
#: shape of Qwen3-30B-A3B.
TILES = [
    (10, Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
    (20, Tile(32, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4)),
    (64, Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 8, 3)),
    (192, Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)),
]
MANY = Tile(128, 64, 64, 8, 3), Tile(128, 256, 64, 8, 4)


@triton.jit  # type: ignore[untyped-decorator]
def largest_kernel(  # type: ignore[no-untyped-def]
    scores, values, places, size, few: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    """values, places [N, few] of scores [N, size]: one program a row, which takes out one largest after the other."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    left = tl.load(scores + row * size + lane, lane < size, -float("inf")).to(tl.float32)
    # Where a score is not a number, or nothing above -inf is left, places must be distinct all the same.
    left = tl.where(left == left, left, -float("inf"))
    free = lane < size
    for rank in range(few):
        top = tl.max(tl.where(free, left, -float("inf")), 0)
        place = tl.min(tl.where(free & (left == top), lane, padded), 0)
        tl.store(values + row * few + rank, top.to(values.dtype.element_ty))
        tl.store(places + row * few + rank, place.to(tl.int64))
        free = free & (lane != place)


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of contiguous ``scores`` [N, E], in order, and their places."""
    rows, size = scores.shape
    values = scores.new_empty(rows, count)
    places = torch.empty(rows, count, dtype=torch.int64, device=scores.device)
    if rows:
        largest_kernel[(rows,)](scores, values, places, size, count, triton.next_power_of_2(size), num_warps=1)
    return values, places


@triton.jit  # type: ignore[untyped-decorator]
def order_kernel(  # type: ignore[no-untyped-def]
    experts, order, back, ends, count, piece: tl.constexpr
):  # fmt: skip
    """order [count]: the assignments to experts [count] sorted by expert; back [count]: where each is then; and where
    the last of each expert is. One program for an expert, which looks at all assignments: how many are before its own,
    and which are its own."""
    own = tl.program_id(0)
    lane = tl.arange(0, piece)
    before = tl.zeros((piece,), tl.int32)
    for start in range(0, count, piece):
        chosen = tl.load(experts + start + lane, start + lane < count, own).to(tl.int32)
        before += (chosen < own).to(tl.int32)
    first = tl.sum(before, 0)
    for start in range(0, count, piece):
        inside = start + lane < count
        chosen = tl.load(experts + start + lane, inside, -1).to(tl.int32)
        mine = (chosen == own).to(tl.int32)
        place = first + tl.cumsum(mine, 0) - 1
        tl.store(order + place, (start + lane).to(tl.int32), mine > 0)
        tl.store(back + start + lane, place, mine > 0)
        first += tl.sum(mine, 0)
    tl.store(ends + own, first)


def ordered(experts: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order, way back and ends of the contiguous ``experts`` of assignments, of which there are ``count``, as of
    :class:`penstock.ops.experts.ByExpert`: all int32."""
    order, back = (torch.empty(experts.numel(), dtype=torch.int32, device=experts.device) for _ in range(2))
    ends = torch.empty(count, dtype=torch.int32, device=experts.device)
    piece = min(triton.next_power_of_2(max(experts.numel(), 32)), PIECE)
    order_kernel[(count,)](experts, order, back, ends, experts.numel(), piece, num_warps=max(8, piece // OWN))
    return order, back, ends


@triton.jit(do_not_specialize=["tiles"])  # type: ignore[untyped-decorator]
def gated_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, order, ends, tiles, ffn, size,
    few: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr,
    groups: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """out [M, ffn] = silu(gate) * up of assignments in ``order``, where gate and up are x [N, size] times transposed
    halves of weight [groups, 2 * ffn, size]. One program for a tile of the result."""
    tile, column = tl.program_id(0) % tiles, tl.program_id(0) // tiles * columns + tl.arange(0, columns)
    own, first, stop = tile_of(ends, tile, rows, groups, padded)
    if own >= groups:
        return
    row, lane = first + tl.arange(0, rows), tl.arange(0, depth)
    inside_rows, inside_columns = row < stop, column < ffn
    token = tl.load(order + row, inside_rows, 0) // few
    from_x = x + token.to(tl.int64)[:, None] * size + lane[None, :]
    from_gate = weight + own.to(tl.int64) * 2 * ffn * size + column.to(tl.int64)[None, :] * size + lane[:, None]
    from_up = from_gate + ffn.to(tl.int64) * size
    gate = tl.zeros((rows, columns), tl.float32)
    up = tl.zeros((rows, columns), tl.float32)
    for at in range(0, size, depth):
        inside = at + lane < size
        a = tl.load(from_x + at, inside_rows[:, None] & inside[None, :], 0.0)
        b = tl.load(from_gate + at, inside_columns[None, :] & inside[:, None], 0.0)
        c = tl.load(from_up + at, inside_columns[None, :] & inside[:, None], 0.0)
        gate = tl.dot(a, b, gate)
        up = tl.dot(a, c, up)
    kind = out.dtype.element_ty
    # Rounded where two products and operators between them would round.
    gate, up = gate.to(kind).to(tl.float32), up.to(kind).to(tl.float32)
    value = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32) * up
    to = out + row.to(tl.int64)[:, None] * ffn + column[None, :]
    tl.store(to, value.to(kind), inside_rows[:, None] & inside_columns[None, :])


@triton.jit(do_not_specialize=["tiles"])  # type: ignore[untyped-decorator]
def down_kernel(  # type: ignore[no-untyped-def]
    x, weight, out, order, shares, ends, tiles, height, size,
    rows: tl.constexpr, columns: tl.constexpr, depth: tl.constexpr, groups: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """out [M, height], each row where its assignment belongs, = x [M, size], in ``order``, times the transpose of its
    expert's weight [groups, height, size], and its share [M]."""
    tile, column = tl.program_id(0) % tiles, tl.program_id(0) // tiles * columns + tl.arange(0, columns)
    own, first, stop = tile_of(ends, tile, rows, groups, padded)
    if own >= groups:
        return
    row, lane = first + tl.arange(0, rows), tl.arange(0, depth)
    inside_rows, inside_columns = row < stop, column < height
    place = tl.load(order + row, inside_rows, 0)
    from_x = x + row.to(tl.int64)[:, None] * size + lane[None, :]
    from_weight = weight + own.to(tl.int64) * height * size + column.to(tl.int64)[None, :] * size + lane[:, None]
    total = tl.zeros((rows, columns), tl.float32)
    for at in range(0, size, depth):
        inside = at + lane < size
        a = tl.load(from_x + at, inside_rows[:, None] & inside[None, :], 0.0)
        b = tl.load(from_weight + at, inside_columns[None, :] & inside[:, None], 0.0)
        total = tl.dot(a, b, total)
    kind = out.dtype.element_ty
    share = tl.load(shares + place, inside_rows, 0.0).to(tl.float32)
    value = total.to(kind).to(tl.float32) * share[:, None]
    to = out + place.to(tl.int64)[:, None] * height + column[None, :]
    tl.store(to, value.to(kind), inside_rows[:, None] & inside_columns[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def sum_kernel(each, out, height, few: tl.constexpr, columns: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [N, height], the sums of each [N, few, height] over the second dimension, in its order. One program for some
    columns of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros((columns,), tl.float32)
    for place in tl.static_range(few):
        total += tl.load(each + (row * few + place) * height + column, column < height, 0.0).to(tl.float32)
    tl.store(out + row * height + column, total.to(out.dtype.element_ty), column < height)


def summed(each: Tensor) -> Tensor:
    """[N, hidden], the sums of contiguous ``each`` [N, k, hidden] in float32, rounded once."""
    count, few, height = each.shape
    out = each.new_empty(count, height)
    columns = min(triton.next_power_of_2(height), COLUMNS)
    sum_kernel[(count, triton.cdiv(height, columns))](each, out, height, few, columns, num_warps=4)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def gathered_kernel(  # type: ignore[no-untyped-def]
    found, back, shares, out, height, few: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    """out [N, height], the sums of the rows ``back`` [N, few] of found [..., height] times their shares [N, few], in
    their order. One program for some columns of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * columns + tl.arange(0, columns)
    kind = out.dtype.element_ty
    total = tl.zeros((columns,), tl.float32)
    for place in tl.static_range(few):
        at = tl.load(back + row * few + place).to(tl.int64)
        share = tl.load(shares + row * few + place).to(kind).to(tl.float32)
        own = tl.load(found + at * height + column, column < height, 0.0).to(tl.float32)
        total += (own * share).to(kind).to(tl.float32)
    tl.store(out + row * height + column, total.to(kind), column < height)


def gathered(found: Tensor, back: Tensor, shares: Tensor) -> Tensor:
    """[N, hidden], the sums of rows ``back`` [N * k] of contiguous ``found`` [N * k, hidden], times contiguous
    ``shares`` [N, k], in float32: rounded after each product, where operators would round, and once at the end."""
    (count, few), height = shares.shape, found.shape[1]
    out = found.new_empty(count, height)
    columns = min(triton.next_power_of_2(height), COLUMNS)
    if count:
        grid = count, triton.cdiv(height, columns)
        gathered_kernel[grid](found, back, shares, out, height, few, columns, num_warps=4)
    return out


def mixed(x: Tensor, experts: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """What the ``experts`` [N, k] of each token make of it, ``x`` [N, hidden], times their shares [N, k], and added up
    in their order: [N, hidden]."""
    if not experts.numel():
        return torch.zeros_like(x)
    wide, narrow = next(((wide, narrow) for most, wide, narrow in TILES if experts.numel() <= most * len(down)), MANY)
    return summed(multiply(x, experts, shares, gate_up, down, _fitting(wide, x, 2), _fitting(narrow, x, 1)))


def _fitting(tile: Tile, x: Tensor, matrices: int) -> Tile:
    """The tile with no more stages than the device of ``x`` has room for, for a product with so many ``matrices``."""
    size = x.itemsize * tile.depth * (tile.rows + matrices * tile.columns)
    return tile._replace(stages=stages(x.device, tile.stages, size))


def multiply(
    x: Tensor, experts: Tensor, shares: Tensor, gate_up: Tensor, down: Tensor, wide: Tile, narrow: Tile
) -> Tensor:
    """What each of its ``experts`` [N, k] makes of each token ``x`` [N, hidden], times its share, by such tiles:
    [N, k, hidden]."""
    (groups, height, ffn), few, count = down.shape, experts.shape[1], experts.numel()
    out = torch.empty(*experts.shape, height, dtype=x.dtype, device=x.device)
    order, _, ends = ordered(experts, groups)
    hidden = torch.empty(count, ffn, dtype=x.dtype, device=x.device)
    padded = triton.next_power_of_2(groups)
    tiles = min(count, triton.cdiv(count, wide.rows) + groups)
    gated_kernel[(tiles * triton.cdiv(ffn, wide.columns),)](
        x, gate_up, hidden, order, ends, tiles, ffn, x.shape[1],
        few, wide.rows, wide.columns, wide.depth, groups, padded, num_warps=wide.warps, num_stages=wide.stages,
    )  # fmt: skip
    tiles = min(count, triton.cdiv(count, narrow.rows) + groups)
    down_kernel[(tiles * triton.cdiv(height, narrow.columns),)](
        hidden, down, out, order, shares, ends, tiles, height, ffn,
        narrow.rows, narrow.columns, narrow.depth, groups, padded, num_warps=narrow.warps, num_stages=narrow.stages,
    )  # fmt: skip
    return out
