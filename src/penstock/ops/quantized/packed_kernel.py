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

from penstock.ops.multiprocessors import processors, read_shared_memory, stages


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
        (16, Tile(16, 64, 128, 4, 3, 6)),
        (32, Tile(32, 128, 128, 4, 3, 4)),
        (64, Tile(64, 128, 128, 8, 5, 2)),
    ),
    8: (
        (16, Tile(16, 64, 128, 4, 3, 4)),
        (32, Tile(32, 64, 128, 4, 3, 4)),
        (64, Tile(64, 64, 128, 4, 3, 3)),
    ),
}
MANY = Tile(128, 128, 128, 8, 4, 1)

#: The pieces of a sum at most, and the least columns of one.
PIECES, COLUMNS = 8, 1024

#: Sums that a program adds up.
LANES = 1024


@triton.jit
def integers(raw):  # type: ignore[no-untyped-def]
    """Integers in 4 bits, which are stored with 8 added, in bfloat16: written into the mantissa of 128, whose last bit
    is worth one, they are 136 more than they ought to be."""
    raised = (raw.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    return (raised.to(tl.float32) - 136.0).to(tl.bfloat16)


@triton.jit
def quarters(raw):  # type: ignore[no-untyped-def]
    """The four :func:`integers` in each uint16, from the lowest bits on: of two words at a time, as they lie in a
    register, and as matrix units want them."""
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
def floats(raw):  # type: ignore[no-untyped-def]
    """Numbers of e2m1 in the lowest four bits, in bfloat16: a sign, two bits of the exponent, with a bias of 1, and one
    of the mantissa."""
    low = (raw & 7).to(tl.uint16)
    bits = tl.where(low < 2, low * 0x3F00, (((low >> 1) + 126) << 7) | ((low & 1) << 6))
    return (bits | ((raw & 8).to(tl.uint16) << 12)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def number(several, place: tl.constexpr):  # type: ignore[no-untyped-def]
    """The one at a ``place`` of several bfloat16 in an integer, from the lowest bits on."""
    return ((several >> (16 * place)) & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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
def sums(  # type: ignore[no-untyped-def]
    from_x, from_values, scale, offset, row, inside, there, width, groups, down, along, each, begin, steps,
    together: tl.constexpr, table: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """[tall, rows]: rows of a matrix that are ``inside`` times rows of x that are ``there``, over the ``steps`` of
    ``wide`` numbers from ``begin`` on, of which ``each`` make a group; ``even``, if they fill all rows. ``from_values``
    [tall, wide] and ``from_x`` [wide, rows] point to the first ones, and the scales are those of ``row``. Where the
    matrix is in 4 bits, ``together`` numbers of it are in one, two in a uint8 or four in a uint16, and as many of x in
    an int32 or an int64; they are e2m1 where there is a ``table``."""
    lane = tl.arange(0, wide)
    total = tl.zeros((tall, rows), tl.float32)
    ones = tl.full((tall, wide), 1.0, tl.bfloat16)
    factor, added = factors(scale, offset, row, inside, begin // each, groups, down, along, shifted)
    for step in range(begin, begin + steps):
        at = step * wide
        if even:
            raw = tl.load(from_values + at, inside[:, None], 0.0)
            given = tl.load(from_x + at, there[None, :], 0.0)
        else:
            raw = tl.load(from_values + at, inside[:, None] & (at + lane < width)[None, :], 0.0)
            given = tl.load(from_x + at, there[None, :] & (at + lane < width)[:, None], 0.0)
        # Those of the next step, which are there when they are wanted.
        group = (step + 1) // each
        next_factor, next_added = factors(scale, offset, row, inside, group, groups, down, along, shifted)
        if together == 4:
            if table:
                first, second, third, fourth = floats(raw), floats(raw >> 4), floats(raw >> 8), floats(raw >> 12)
            else:
                first, second, third, fourth = quarters(raw)
            a, b, c, d = number(given, 0), number(given, 1), number(given, 2), number(given, 3)
            total += factor[:, None] * tl.dot(fourth, d, tl.dot(third, c, tl.dot(second, b, tl.dot(first, a))))
            if shifted:
                total += added[:, None] * tl.dot(ones, d, tl.dot(ones, c, tl.dot(ones, b, tl.dot(ones, a))))
        elif together == 2:
            if table:
                first, second = floats(raw), floats(raw >> 4)
            else:
                first, second = integers(raw & 15), integers(raw >> 4)
            a, b = number(given, 0), number(given, 1)
            total += factor[:, None] * tl.dot(second, b, tl.dot(first, a))
            if shifted:
                total += added[:, None] * tl.dot(ones, b, tl.dot(ones, a))
        else:
            total += factor[:, None] * tl.dot(raw.to(tl.float32).to(tl.bfloat16), given)
            if shifted:
                total += added[:, None] * tl.dot(ones, given)
        factor, added = next_factor, next_added
    return total


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]
    x, values, scale, offset, out, count, height, width, groups, down, along, each, steps,
    together: tl.constexpr, table: tl.constexpr, shifted: tl.constexpr, even: tl.constexpr,
    rows: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """out [pieces, count, height] = x [count, size] times the transpose of a matrix [height, size], which is stored as
    values [height, width], as :func:`sums` has it. One program for a tile of the result, which is computed on its side:
    matrix units take what stands on the left from registers."""
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    own = tl.program_id(1) * rows + tl.arange(0, rows)
    inside, there = row < height, own < count
    lane = tl.arange(0, wide)
    from_values = values + row.to(tl.int64)[:, None] * width + lane[None, :]
    from_x = x + own.to(tl.int64)[None, :] * width + lane[:, None]
    total = sums(
        from_x, from_values, scale, offset, row, inside, there, width, groups, down, along, each,
        tl.program_id(2) * steps, steps, together, table, shifted, even, rows, tall, wide,
    )  # fmt: skip
    to = out + (tl.program_id(2).to(tl.int64) * count + own.to(tl.int64)[None, :]) * height + row[:, None]
    tl.store(to, total.to(out.dtype.element_ty), inside[:, None] & there[None, :])


@triton.jit(do_not_specialize=["size"])  # type: ignore[untyped-decorator]
def sum_kernel(pieces, out, size, count: tl.constexpr, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [size], the sum of ``count`` pieces [count, size], in their order."""
    at = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    total = tl.zeros((lanes,), tl.float32)
    for piece in tl.static_range(count):
        total += tl.load(pieces + piece * size.to(tl.int64) + at, at < size, 0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), at < size)


def product(kind: str, x: Tensor, values: Tensor, scale: Tensor, offset: Tensor | None, group: int) -> Tensor:
    """``x`` bfloat16 [N, K], at whole 8 bytes, and K even for 4 bits, times the transpose of a matrix [M, K]: bfloat16
    [N, M]. Products are exact and sums float32.

    Args:
        kind: int4, e2m1, int8 or e4m3.
        values: uint8 [M, K / 2] for the first two, int8 [M, K] or float8_e4m3fn [M, K].
        scale: float32 [M, k], with any strides.
        offset: the same, with those of the scale.
        group: columns of a group, of whole 32.
    """
    (count, size), bits = x.shape, bits_of(kind)
    largest = MANY if read_shared_memory(x.device) else TILES[bits][-1][1]
    tile = next((tile for most, tile in TILES[bits] if count <= most), largest)
    pieces = pieces_of(count, values.shape[0], size, tile, processors(x.device))
    stage = math.gcd(group, tile.depth) * (2 * tile.rows + bits * tile.height // 8)
    tile = tile._replace(stages=stages(x.device, tile.stages, stage))
    return multiply(kind, x, values, scale, offset, group, tile, pieces)


def bits_of(kind: str) -> int:
    """Those of a number."""
    return 4 if kind in ("int4", "e2m1") else 8


def together(kind: str, x: Tensor, values: Tensor, depth: int) -> tuple[Tensor, Tensor, int]:
    """``x`` and ``values`` as a kernel reads them that takes ``depth`` numbers of a row at a time, and how many are in
    one there: where it is four, at least 16 of them are multiplied at a time."""
    if bits_of(kind) == 8:
        return x, values, 1
    if x.shape[1] % 4 == 0 and depth >= 64:
        return x.view(torch.int64), values.view(torch.uint16), 4
    return x.view(torch.int32), values, 2


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
    (count, size), height, depth = x.shape, values.shape[0], math.gcd(group, tile.depth)
    whole = triton.cdiv(size, depth)
    steps = triton.cdiv(whole, pieces)
    pieces = triton.cdiv(whole, steps)
    found = torch.empty(pieces, count, height, dtype=torch.bfloat16 if pieces == 1 else torch.float32, device=x.device)
    grid = (triton.cdiv(height, tile.height), triton.cdiv(count, tile.rows), pieces)
    x, values, in_one = together(kind, x, values, depth)
    product_kernel[grid](
        x, values, scale, scale if offset is None else offset, found,
        count, height, values.shape[1], scale.shape[1], *scale.stride(), group // depth, steps,
        in_one, kind == "e2m1", offset is not None, size == pieces * steps * depth,
        tile.rows, tile.height, depth // in_one,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if pieces == 1:
        return found[0]
    out = torch.empty(count, height, dtype=torch.bfloat16, device=x.device)
    sum_kernel[(triton.cdiv(out.numel(), LANES),)](found, out, out.numel(), pieces, LANES, num_warps=4)
    return out
