"""The kernel for products with matrices in few bits, which it reads as they are stored.

Up to some dozens of rows, a product takes as long as reading the matrix, so that one in 4 bits takes a quarter of the
time of one in 16, if the matrix units do not wait for what turns bits into numbers. Hence: numbers are decoded in
registers, on the side of the product that matrix units take from there; integers in 4 bits are decoded by writing them
into mantissas, two with one instruction; numbers are neither scaled nor shifted before the product but behind it; and
where the rows of the matrix do not keep the device busy, sums are cut in pieces that are added up by a second kernel,
always in the same order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.core.devices import lasting
from penstock.ops.multiprocessors import processors, read_shared_memory, stages
from penstock.ops.quantized.nibbles import BLOCK, PLANE


class Tile(NamedTuple):
    """What a program works on: so many rows of x and of the matrix, and how many columns at a time; and how many such
    ``programs`` a processor is given at most by cutting sums in pieces."""

    rows: int
    height: int
    depth: int
    warps: int
    stages: int
    programs: int


#: For matrices in 4 bits and in 8, by how many rows x has at most; and for more, where its sums fit into registers.
#: Measured on an H200, for the matrices of Qwen3-8B.
TILES = {
    4: (
        (8, Tile(8, 128, 128, 4, 3, 6)),
        (16, Tile(16, 128, 128, 4, 3, 4)),
        (32, Tile(32, 128, 128, 4, 4, 3)),
        (64, Tile(64, 128, 128, 4, 3, 2)),
        (128, Tile(64, 128, 128, 8, 3, 2)),
    ),
    8: (
        (16, Tile(16, 64, 128, 4, 3, 4)),
        (32, Tile(32, 64, 128, 4, 3, 4)),
        (64, Tile(64, 64, 128, 4, 3, 3)),
    ),
}
MANY = Tile(128, 128, 128, 8, 4, 1)

#: The pieces of a sum at most, and the least columns of one.
PIECES, COLUMNS = 8, 512


@triton.jit
def integers(raw):  # type: ignore[no-untyped-def]
    """Integers in 4 bits, which are stored with 8 added, in bfloat16: written into the mantissa of 128, whose last bit
    is worth one, they are 136 more than they ought to be."""
    raised = (raw.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    return (raised.to(tl.float32) - 136.0).to(tl.bfloat16)


@triton.jit
def floats(raw):  # type: ignore[no-untyped-def]
    """Numbers of e2m1 in the lowest four bits, in bfloat16: a sign, two bits of the exponent, with a bias of 1, and one
    of the mantissa."""
    low = (raw & 7).to(tl.uint16)
    bits = tl.where(low < 2, low * 0x3F00, (((low >> 1) + 126) << 7) | ((low & 1) << 6))
    return (bits | ((raw & 8).to(tl.uint16) << 12)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def four_integers(raw):  # type: ignore[no-untyped-def]
    """The four :func:`integers` in each word of 16 bits, from the lowest bits on: of two words at a time, as they lie
    in a register, and as matrix units want them."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, one, less;
        mov.b32 one, 0x3f803f80;
        mov.b32 less, 0xc308c308;
        shr.b32 b, $4, 4;
        shr.b32 c, $4, 8;
        shr.b32 d, $4, 12;
        lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 b, b, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 c, c, 0x000f000f, 0x43004300, 0xea;
        lop3.b32 d, d, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, a, one, less;
        fma.rn.bf16x2 $1, b, one, less;
        fma.rn.bf16x2 $2, c, one, less;
        fma.rn.bf16x2 $3, d, one, less;
        }
        """,
        "=r,=r,=r,=r,r", [raw], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def four_floats(raw):  # type: ignore[no-untyped-def]
    """The four :func:`floats` in each word of 16 bits, likewise: a sign where bfloat16 has it, and the rest on both
    sides of where its exponent ends make numbers that are 2 ** 126 times too small, some of them subnormal."""
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, c, d, s, more, zero;
        mov.b32 more, 0x7e807e80;
        mov.b32 zero, 0x80008000;
        shl.b32 a, $4, 6;
        shl.b32 s, $4, 12;
        and.b32 a, a, 0x01c001c0;
        lop3.b32 a, s, 0x80008000, a, 0xea;
        shl.b32 b, $4, 2;
        shl.b32 s, $4, 8;
        and.b32 b, b, 0x01c001c0;
        lop3.b32 b, s, 0x80008000, b, 0xea;
        shr.b32 c, $4, 2;
        shl.b32 s, $4, 4;
        and.b32 c, c, 0x01c001c0;
        lop3.b32 c, s, 0x80008000, c, 0xea;
        shr.b32 d, $4, 6;
        and.b32 d, d, 0x01c001c0;
        lop3.b32 d, $4, 0x80008000, d, 0xea;
        fma.rn.bf16x2 $0, a, more, zero;
        fma.rn.bf16x2 $1, b, more, zero;
        fma.rn.bf16x2 $2, c, more, zero;
        fma.rn.bf16x2 $3, d, more, zero;
        }
        """,
        "=&r,=&r,=&r,=&r,r", [raw], (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def factors(  # type: ignore[no-untyped-def]
    scale, offset, row, inside, group, groups, down, along, shifted: tl.constexpr
):  # fmt: skip
    """What the stored numbers of ``row`` in a ``group`` are multiplied by, and what is added to each then, of which the
    next row's are ``down`` from there, and the next group's ``along``; behind the last group, where x is zero, any
    number will do."""
    at = row.to(tl.int64) * down + tl.minimum(group, groups - 1).to(tl.int64) * along
    factor = tl.load(scale + at, inside, 0.0)
    added = tl.zeros_like(factor)
    if shifted:
        added += tl.load(offset + at, inside, 0.0)
    return factor, added


@triton.jit  # type: ignore[untyped-decorator]
def scaled(total, first, x, factor, added, shifted: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` and the product of stored numbers with x, scaled."""
    total += factor[:, None] * tl.dot(first, x)
    if shifted:
        total += added[:, None] * tl.dot(tl.full(first.shape, 1.0, tl.float32).to(tl.bfloat16), x)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def block_factors(  # type: ignore[no-untyped-def]
    scale, offset, row, inside, column, groups, down, along, group: tl.constexpr, shifted: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """The :func:`factors` of the four planes of the block from ``column`` on."""
    a = factors(scale, offset, row, inside, column // group, groups, down, along, shifted)
    if group % (4 * wide) == 0:
        b, c, d = a, a, a
    else:
        b = factors(scale, offset, row, inside, (column + wide) // group, groups, down, along, shifted)
        c = factors(scale, offset, row, inside, (column + 2 * wide) // group, groups, down, along, shifted)
        d = factors(scale, offset, row, inside, (column + 3 * wide) // group, groups, down, along, shifted)
    return a, b, c, d


@triton.jit  # type: ignore[untyped-decorator]
def block_added(  # type: ignore[no-untyped-def]
    total, from_x, from_values, known, inside, there, kind: tl.constexpr, group: tl.constexpr, shifted: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """``total`` and the product of a block of interleaved numbers, in four planes of ``wide`` columns, with x; the
    planes' factors are ``known``."""
    raw = tl.load(from_values, inside[:, None], 0)
    a, b = tl.load(from_x, there[None, :], 0.0), tl.load(from_x + wide, there[None, :], 0.0)
    c, d = tl.load(from_x + 2 * wide, there[None, :], 0.0), tl.load(from_x + 3 * wide, there[None, :], 0.0)
    if kind == "int4":
        first, second, third, fourth = four_integers(raw)
    else:
        first, second, third, fourth = four_floats(raw)
    if group % (4 * wide) == 0:
        factor, added = known[0]
        total += factor[:, None] * tl.dot(fourth, d, tl.dot(third, c, tl.dot(second, b, tl.dot(first, a))))
        if shifted:
            ones = tl.full((tall, wide), 1.0, tl.float32).to(tl.bfloat16)
            total += added[:, None] * tl.dot(ones, d, tl.dot(ones, c, tl.dot(ones, b, tl.dot(ones, a))))
    else:
        total = scaled(total, first, a, known[0][0], known[0][1], shifted)
        total = scaled(total, second, b, known[1][0], known[1][1], shifted)
        total = scaled(total, third, c, known[2][0], known[2][1], shifted)
        total = scaled(total, fourth, d, known[3][0], known[3][1], shifted)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def half_added(  # type: ignore[no-untyped-def]
    total, from_x, from_values, scale, offset, row, inside, there, column, groups, down, along, wanted,
    kind: tl.constexpr, group: tl.constexpr, shifted: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """``total`` and, where it is ``wanted``, the product of half a block from ``column`` on, in planes that are
    ``wide``."""
    if wanted:
        lane = tl.arange(0, wide)
        known = block_factors(scale, offset, row, inside, column, groups, down, along, group, shifted, wide)
        total = block_added(
            total, from_x + lane[:, None], from_values + lane[None, :], known, inside, there, kind, group, shifted,
            tall, wide,
        )  # fmt: skip
    return total


@triton.jit  # type: ignore[untyped-decorator]
def interleaved_sums(  # type: ignore[no-untyped-def]
    from_x, from_values, scale, offset, row, inside, there, groups, down, along, begin, end, last,
    kind: tl.constexpr, group: tl.constexpr, shifted: tl.constexpr, half: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """:func:`sums` of interleaved numbers, a block of ``4 * wide`` columns at a time; and of ``half`` of one behind
    the ``last``."""
    total = tl.zeros((tall, rows), tl.float32)
    block: tl.constexpr = 4 * wide
    lane = tl.arange(0, wide)
    known = block_factors(scale, offset, row, inside, begin * block, groups, down, along, group, shifted, wide)
    for step in range(begin, end):
        # Those of the next step, which are there when they are wanted.
        after = block_factors(scale, offset, row, inside, (step + 1) * block, groups, down, along, group, shifted, wide)
        total = block_added(
            total, from_x + step * block + lane[:, None], from_values + step * wide + lane[None, :], known, inside,
            there, kind, group, shifted, tall, wide,
        )  # fmt: skip
        known = after
    if half:
        total = half_added(
            total, from_x + last * block, from_values + last * wide, scale, offset, row, inside, there, last * block,
            groups, down, along, end == last, kind, group, shifted, tall, wide // 2,
        )  # fmt: skip
    return total


@triton.jit  # type: ignore[untyped-decorator]
def straight_sums(  # type: ignore[no-untyped-def]
    from_x, from_values, scale, offset, row, inside, there, size, groups, down, along, begin, end,
    kind: tl.constexpr, group: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """:func:`sums` of numbers in 8 bits, or in 4 bits in pairs, ``wide`` bytes at a time, which are in one group;
    ``even`` if rows of the matrix have so many whole ones."""
    pair: tl.constexpr = 2 if kind == "int4" or kind == "e2m1" else 1
    lane = tl.arange(0, wide)
    total = tl.zeros((tall, rows), tl.float32)
    steps: tl.constexpr = group // (pair * wide)
    factor, added = factors(scale, offset, row, inside, begin // steps, groups, down, along, shifted)
    for step in range(begin, end):
        # Those of the next step, which are there when they are wanted.
        after = factors(scale, offset, row, inside, (step + 1) // steps, groups, down, along, shifted)
        given, own = there[None, :], inside[:, None]
        if not even:
            left = pair * (step * wide + lane) < size
            given, own = given & left[:, None], own & left[None, :]
        raw = tl.load(from_values + step * wide, own, 0.0)
        a = tl.load(from_x + step * pair * wide, given, 0.0)
        if pair == 1:
            total = scaled(total, raw.to(tl.float32).to(tl.bfloat16), a, factor, added, shifted)
        else:
            b = tl.load(from_x + step * pair * wide + 1, given, 0.0)
            if kind == "int4":
                first, second = integers(raw & 15), integers(raw >> 4)
            else:
                first, second = floats(raw), floats(raw >> 4)
            total = scaled(total, first, a, factor, added, shifted)
            total = scaled(total, second, b, factor, added, shifted)
        factor, added = after
    return total


@triton.jit  # type: ignore[untyped-decorator]
def sums(  # type: ignore[no-untyped-def]
    x, values, scale, offset, own, row, inside, there, size, stored, groups, down, along, begin, end, last,
    kind: tl.constexpr, group: tl.constexpr, interleaved: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """[tall, rows]: the rows ``row`` of a matrix [M, size], if they are ``inside``, times rows ``own`` of x [N, size],
    if they are ``there``; over the steps from ``begin`` to ``end``, of which there are ``last``. See :func:`product`
    for how ``values``, with ``stored`` in a row, are stored, and what is called for that for the rest."""
    lane, line, given = tl.arange(0, wide), row.to(tl.int64)[:, None], own.to(tl.int64)[None, :] * size
    if interleaved:
        total = interleaved_sums(
            x + given, values + line * stored, scale, offset, row, inside, there, groups, down, along,
            begin, end, last, kind, group, shifted, not even, rows, tall, wide,
        )  # fmt: skip
    else:
        pair: tl.constexpr = 2 if kind == "int4" or kind == "e2m1" else 1
        total = straight_sums(
            x + given + pair * lane[:, None], values + line * stored + lane[None, :], scale, offset, row, inside,
            there, size, groups, down, along, begin, end, kind, group, shifted, even, rows, tall, wide,
        )  # fmt: skip
    return total


@triton.jit(do_not_specialize=["count", "pieces"])  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, offset, parts, counters, out, count, height, size, stored, groups, down, along, pieces, last,
    kind: tl.constexpr, group: tl.constexpr, interleaved: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    cut: tl.constexpr, rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """out [count, height] = x [count, size] times the transpose of a matrix [height, size], see :func:`sums`. One
    program for a tile of the result, which is computed on its side: matrix units take what stands on the left from
    registers. Where sums are ``cut`` in pieces, programs write these to ``parts`` [pieces, count, height], and of those
    of a tile, who is the last one adds up, always in the same order; ``counters``, zeros, tell who that is."""
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    own = tl.program_id(1) * rows + tl.arange(0, rows)
    inside, there = row < height, own < count
    steps, piece = tl.cdiv(last, pieces), tl.program_id(2)
    total = sums(
        x, values, scale, offset, own, row, inside, there, size, stored, groups, down, along, piece * steps,
        tl.minimum((piece + 1) * steps, last), last, kind, group, interleaved, shifted, even, rows, tall, wide,
    )  # fmt: skip
    to = own.to(tl.int64)[None, :] * height + row[:, None]
    here = inside[:, None] & there[None, :]
    if not cut:
        tl.store(out + to, total.to(out.dtype.element_ty), here)
    else:
        apart = count.to(tl.int64) * height
        tl.store(parts + piece * apart + to, total, here)
        tl.debug_barrier()  # all threads have written before one of them says so
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1) == pieces - 1:
            total = tl.zeros((tall, rows), tl.float32)
            part = parts + to
            for _ in range(pieces):
                # What others wrote is in the device's cache, and not in that of a processor.
                total += tl.load(part, here, 0.0, cache_modifier=".cg")
                part += apart
            tl.store(out + to, total.to(out.dtype.element_ty), here)
            tl.store(counter, 0)


class Steps(NamedTuple):
    """How a kernel goes through the columns of a matrix, as of :func:`sums`."""

    interleaved: bool
    #: Whether rows are so many whole steps; those of interleaved numbers have half a one more if not.
    even: bool
    #: Stored values of a step, or of a plane of it; and all steps.
    wide: int
    last: int


def steps_of(kind: str, values: Tensor, size: int, group: int, depth: int) -> Steps:
    """Those through ``values`` of rows of so many numbers, in groups, about ``depth`` at a time."""
    if values.dtype == torch.int16:
        return Steps(True, size % BLOCK == 0, PLANE, size // BLOCK)
    depth = math.gcd(group, depth)
    return Steps(False, size % depth == 0, depth * bits_of(kind) // 8, triton.cdiv(size, depth))


class Counters:
    """Zeros on a device, of which calls one after the other get others: two at the same time do not get the same
    ones."""

    def __init__(self, device: torch.device) -> None:
        self._zeros, self._next = torch.zeros(1 << 16, dtype=torch.int32, device=device), 0

    def take(self, count: int) -> Tensor:
        """So many of them."""
        start = self._next if self._next + count <= len(self._zeros) else 0
        self._next = start + count
        return self._zeros[start : self._next]


#: Those of each device. Who uses them leaves zeros.
counters_of = lasting(Counters)


def product(kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """``x`` bfloat16 [N, K], at whole 16 bytes, and K even for 4 bits, times the transpose of a matrix [M, K]: bfloat16
    [N, M]. Products are exact and sums float32.

    Args:
        kind: int4, e2m1, int8 or e4m3.
        values: for the first two in either order of :mod:`~penstock.ops.quantized.nibbles`; int8 [M, K] or
            float8_e4m3fn [M, K].
        scale: float32 [M, k], with any strides.
        offset: the same, with those of the scale.
        group: columns of a group, of whole 32.
    """
    (count, size), bits = x.shape, bits_of(kind)
    largest = MANY if read_shared_memory(x.device) else TILES[bits][-1][1]
    tile = next((tile for most, tile in TILES[bits] if count <= most), largest)
    pieces = pieces_of(count, values.shape[0], size, tile, processors(x.device))
    return multiply(kind, x, values, scale, offset, group, fitting(tile, kind, values, group), pieces)


def fitting(tile: Tile, kind: str, values: Tensor, group: int) -> Tile:
    """The ``tile`` with no more stages than the device has room for."""
    depth = BLOCK if values.dtype == torch.int16 else math.gcd(group, tile.depth)
    stage = depth * (2 * tile.rows + bits_of(kind) * tile.height // 8)
    return tile._replace(stages=stages(values.device, tile.stages, stage))


def bits_of(kind: str) -> int:
    """Those of a number."""
    return 4 if kind in ("int4", "e2m1") else 8


def pieces_of(count: int, height: int, size: int, tile: Tile, processors: int) -> int:
    """In how many pieces to cut sums of ``size`` terms, for [count, height] of them on a device of so many
    ``processors``: a power of two, so that pieces are more often alike."""
    programs: int = triton.cdiv(count, tile.rows) * triton.cdiv(height, tile.height)
    most = max(1, min(tile.programs * processors // programs, PIECES, size // COLUMNS))
    return 1 << (most.bit_length() - 1)


def multiply(
    kind: str,
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    group: int,
    tile: Tile,
    pieces: int,
) -> Tensor:
    """:func:`product` by such tiles, each of its sums in about so many ``pieces``."""
    (count, size), height = x.shape, values.shape[0]
    way = steps_of(kind, values, size, group, tile.depth)
    pieces = triton.cdiv(way.last, triton.cdiv(way.last, pieces))  # none is empty
    out = torch.empty(count, height, dtype=torch.bfloat16, device=x.device)
    parts, counters, tiles = out, out, (triton.cdiv(height, tile.height), triton.cdiv(count, tile.rows))
    if pieces > 1:
        parts = torch.empty(pieces, count, height, dtype=torch.float32, device=x.device)
        counters = counters_of(x.device).take(math.prod(tiles))
    product_kernel[(*tiles, pieces)](
        x, values, scale, scale if offset is None else offset, parts, counters, out,
        count, height, size, values.shape[1], scale.shape[1], *scale.stride(), pieces, way.last,
        kind, group, way.interleaved, offset is not None, way.even, pieces > 1, tile.rows, tile.height, way.wide,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
