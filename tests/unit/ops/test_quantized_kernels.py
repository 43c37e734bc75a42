"""Kernels for quantized matrices on CUDA, beside the dequantized matrix in float64; also without a GPU, by Triton's
interpreter (``TRITON_INTERPRET=1``)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interpreted import DEVICE, repaired, runs
from penstock.ops.quantized.codebook import Codebook4
from penstock.ops.quantized.contract import Parts, WeightFormat
from penstock.ops.quantized.fp8 import Fp8
from penstock.ops.quantized.integers import Int4, Int8

packed_kernel = pytest.importorskip("penstock.ops.quantized.packed_kernel")
from penstock.ops.quantized import cuda, grouped_kernel, nibbles, plain_kernel, rounded_kernel  # noqa: E402
from penstock.ops.quantized.packed_kernel import Tile  # noqa: E402

pytestmark = runs
__all__ = ["repaired"]

KINDS: dict[str, Callable[..., WeightFormat]] = {
    "int4": Int4,
    "int8": Int8,
    "e4m3": Fp8,
    "e2m1": functools.partial(Codebook4, table="fp4"),
}
TILE = Tile(16, 64, 64, 4, 3, 1)


def random(kind: str, rows: int, columns: int, group: int | None, shifted: bool) -> tuple[WeightFormat, Parts]:
    """A matrix [rows, columns] of random bits, scales of both signs, and offsets."""
    draw = torch.Generator().manual_seed(rows)
    size = columns // 2 if packed_kernel.bits_of(kind) == 4 else columns
    values = torch.randint(256, (rows, size), generator=draw).to(torch.uint8)
    if kind == "e4m3":  # no NaN
        values = torch.where(values & 127 == 127, 0, values).to(torch.uint8).view(torch.float8_e4m3fn)
    if kind == "int8":
        values = values.view(torch.int8)
    shape = (rows, -(-columns // group) if group else 1)
    parts = {"values": values, "scale": torch.randn(shape, generator=draw)}
    parts |= {"offset": torch.randn(shape, generator=draw)} if shifted else {}
    format = KINDS[kind](group=columns if kind == "e2m1" and group is None else group)
    return format, {name: part.to(DEVICE) for name, part in parts.items()}


def orders(kind: str, parts: Parts) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Values, scales and offsets: as files have them, and as matrices are kept on a device."""
    own = parts["values"], parts["scale"], parts.get("offset")
    values = nibbles.interleaved(own[0]) if packed_kernel.bits_of(kind) == 4 else own[0]
    return [own, (values, *(each if each is None else cuda.arranged(each) for each in own[1:]))]


def given(count: int, columns: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(DEVICE, torch.bfloat16)


def close(found: Tensor, x: Tensor, matrix: Tensor, bound: float = 2**-8) -> None:
    """Up to ``bound`` of the sum of the absolute terms, and bfloat16's rounding of the result."""
    wanted, terms = x.double() @ matrix.double().T, x.double().abs() @ matrix.double().abs().T
    over = (found.double() - wanted).abs() - 2**-8 * wanted.abs() - bound * terms
    assert found.dtype == torch.bfloat16
    assert (over <= 0).all(), f"off by {over.max():.3g} more than may be"


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_with_the_dequantized_matrix(kind: str, group: int | None, shifted: bool) -> None:
    """Rows that fill no tile, few rows of x and more, sums in one piece and in several of which the last is shorter,
    and everything in either order. They are as exact as sums in float32."""
    if kind in ("e4m3", "e2m1") and shifted:
        pytest.skip("floating point has no offsets")
    shapes = ((37, 160, 1, 2), (70, 384, 19, 1), (64, 448, 16, 3), (50, 640, 5, 3), (20, 64, 3, 1), (20, 192, 3, 2))
    for rows, columns, count, pieces in shapes:
        format, parts = random(kind, rows, columns, group, shifted)
        x, matrix = given(count, columns), format.dequantize(parts)
        for own in orders(kind, parts):
            close(packed_kernel.multiply(kind, x, *own, group or cuda.WHOLE, TILE, pieces), x, matrix, 2**-20)
            plain = plain_kernel.plain(kind, *own, group or cuda.WHOLE)
            torch.testing.assert_close(plain, matrix.bfloat16(), rtol=2**-7, atol=1e-6 * float(matrix.abs().max()))


def test_pieces_of_sums_are_added_up_in_one_order_and_leave_no_trace() -> None:
    """The same bits again and again, whoever comes last, and by counters of their own: those of a call are zeros
    afterwards, and the next call's are others, until all were had."""
    _, parts = random("int4", 300, 1024, 128, True)
    own, x = orders("int4", parts)[1], given(19, 1024)
    first = packed_kernel.multiply("int4", x, *own, 128, TILE, 4)
    for _ in range(3 if DEVICE == "cpu" else 200):
        assert torch.equal(packed_kernel.multiply("int4", x, *own, 128, TILE, 4), first)
    counters = packed_kernel.counters_of(x.device)
    zeros = counters.take(1 << 16)
    assert not zeros.any()
    one, other = counters.take(40_000), counters.take(20_000)
    assert one.data_ptr() == zeros.data_ptr() and other.data_ptr() == zeros[40_000:].data_ptr()
    assert counters.take(10_000).data_ptr() == zeros.data_ptr()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_multiplied_with_the_matrices_of_their_experts(kind: str, group: int | None, shifted: bool) -> None:
    """One row and many, of experts that have none, fewer than a tile and more; matrices that fill no tile."""
    if kind in ("e4m3", "e2m1") and shifted:
        pytest.skip("floating point has no offsets")
    for rows, columns, counts in ((37, 160, [0, 1, 0, 0]), (70, 384, [3, 0, 21, 16])):
        format, parts = random(kind, 4 * rows, columns, group, shifted)
        x, matrices = given(sum(counts), columns), format.dequantize(parts).view(4, rows, columns)
        ends = torch.tensor(counts, dtype=torch.int32).cumsum(0).to(DEVICE, torch.int32)
        for own in orders(kind, parts):
            found = grouped_kernel.multiply(kind, x, *own, ends, group or cuda.WHOLE, TILE)
            assert found.shape == (sum(counts), rows)
            for matrix, mine, given_rows in zip(matrices, found.split(counts), x.split(counts), strict=True):
                close(mine, given_rows, matrix, 2**-20)


def test_columns_that_fill_no_group_are_multiplied_too() -> None:
    format, parts = random("int4", 33, 150, 64, True)
    x, matrix = given(3, 150), format.dequantize(parts)
    own = parts["values"], parts["scale"], parts["offset"], 64
    close(packed_kernel.multiply("int4", x, *own, TILE, 2), x, matrix, 2**-20)
    plain = plain_kernel.plain("int4", *own)
    torch.testing.assert_close(plain, matrix.bfloat16(), rtol=2**-7, atol=1e-6 * float(matrix.abs().max()))


@pytest.mark.parametrize("group", [None, 32, 128])
def test_rows_are_rounded_to_the_nearest_of_e4m3(group: int | None) -> None:
    x = given(5, 320) * torch.logspace(-6, 3, 5, device=DEVICE).unsqueeze(1).bfloat16()
    x[1], x[2, :32] = 0, 0
    values, scale = rounded_kernel.rounded(x, group)
    assert values.shape == (16, 320) and scale.stride(0) == 1
    values, scale = values[:5], scale[:5]
    grouped = torch.nn.functional.pad(x.float(), (0, 384 - 320 if group == 128 else 0)).view(5, -1, group or 320)
    factors = grouped.abs().amax(-1) / 448
    torch.testing.assert_close(scale, factors.clamp(min=1e-12), rtol=1e-6, atol=0)
    wanted = (grouped / scale.unsqueeze(-1)).clamp(-448, 448).view(5, -1)[:, :320].to(torch.float8_e4m3fn)
    assert torch.equal(values.float(), wanted.float())


@pytest.mark.parametrize(
    ("bits", "count", "wanted"),
    [
        (4, 8, (8, 4, 8, 8)), (4, 16, (8, 2, 8, 8)), (4, 32, (8, 2, 8, 8)), (4, 64, (4, 1, 8, 8)),
        (8, 1, (4, 1, 8, 8)), (8, 16, (4, 1, 8, 8)), (8, 32, (4, 1, 8, 8)), (8, 64, (4, 1, 4, 4)),
        (4, 128, (2, 1, 4, 4)), (8, 128, (2, 1, 4, 4)), (4, 256, (1, 1, 2, 2)), (8, 256, (1, 1, 2, 2)),
    ],
)  # fmt: skip
def test_sums_are_cut_in_about_the_pieces_that_took_least_time(bits: int, count: int, wanted: tuple[int, ...]) -> None:
    """For the matrices of Qwen3-8B on an H200: the best of 1, 2, 4 and 8, or the next to it."""
    tile = next((tile for most, tile in packed_kernel.TILES[bits] if count <= most), packed_kernel.MANY)
    shapes = (6144, 4096), (24576, 4096), (4096, 12288), (4096, 4096)
    assert tuple(packed_kernel.pieces_of(count, *shape, tile, 132) for shape in shapes) == wanted
