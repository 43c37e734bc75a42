"""Products with quantized matrices: the native ones equal those with the dequantized matrix, whatever the shape."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch

from gguf_files import blocks
from penstock.ops.quantized import contract, cpu, cuda, nibbles
from penstock.ops.quantized.codebook import Codebook4
from penstock.ops.quantized.contract import Packed, Parts, WeightFormat
from penstock.ops.quantized.fp8 import Fp8, rounding_of_rows
from penstock.ops.quantized.ggml import Ggml
from penstock.ops.quantized.integers import Int4, Int8
from penstock.testing.weight_format import check_gradient, check_product

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")


def random(format: WeightFormat, rows: int, columns: int) -> Parts:
    """Parts of a matrix [rows, columns] of random bits and scales."""
    draw = torch.Generator().manual_seed(rows)
    if isinstance(format, Ggml):
        return {"blocks": torch.from_numpy(blocks(np.random.default_rng(0), format.kind, (rows, columns)))}
    halved = isinstance(format, Int4 | Codebook4)
    values = torch.randint(256, (rows, columns // 2 if halved else columns), generator=draw).to(torch.uint8)
    if isinstance(format, Fp8):  # no NaN
        values = torch.where(values & 127 == 127, 0, values).to(torch.uint8).view(torch.float8_e4m3fn)
    if isinstance(format, Int8):
        values = values.view(torch.int8)
    shape = (rows, columns // format.group if format.group else 1)
    parts = {"values": values, "scale": torch.rand(shape, generator=draw)}
    return parts | ({"offset": torch.randn(shape, generator=draw)} if isinstance(format, Int8 | Int4) else {})


FORMATS = [
    *(Ggml(kind=kind) for kind in KINDS),
    *(Int8(), Int8(group=64), Int4(group=32), Int4(group=128), Fp8(), Fp8(group=128)),
    *(Codebook4(table="nf4", group=64), Codebook4(table="fp4", group=32)),
]


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_the_native_product_is_that_with_the_dequantized_matrix(format, monkeypatch):
    """Rows that fill no tile, few rows of x and many; and the native one it is."""
    calls, original = [], cpu.product
    monkeypatch.setattr(cpu, "product", lambda *given, **named: calls.append(given[0]) or original(*given, **named))
    for rows, columns in ((1, 256), (7, 512), (37, 768)):
        for count in (1, 2, 3, 4, 5, 31):
            check_product(format, random(format, rows, columns), count)
    assert len(calls) == 3 * 6 * 2


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_gradients_are_those_of_the_dequantized_matrix(format, monkeypatch):
    """Also where it is dequantized a few rows at a time, of which the last are fewer."""
    check_gradient(format, random(format, 37, 768), 3)
    monkeypatch.setattr(contract, "PIECE", 4 * 768)
    check_gradient(format, random(format, 37, 768), 40)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_ggml_stand_for_what_the_package_gguf_says(kind):
    parts = random(Ggml(kind=kind), 5, 512)
    wanted = gguf.dequantize(parts["blocks"].numpy(), gguf.GGMLQuantizationType[kind])
    found = Ggml(kind=kind).product(torch.eye(512)[:32], parts)
    np.testing.assert_allclose(found.numpy(), wanted[:, :32].T, rtol=1e-6, atol=1e-7)


def test_without_a_compiler_the_product_is_the_same(monkeypatch):
    format = Int4(group=32)
    parts, x = random(format, 9, 64), torch.randn(3, 64)
    native = format.product(x, parts)
    monkeypatch.setattr(cpu.native, "serves", lambda source: False)
    torch.testing.assert_close(format.product(x, parts), native, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", [None, 32, 128])
def test_rows_differ_from_those_in_e4m3_by_no_more_than_is_said(group):
    """And some by about as much: of ordinary size, tiny beside the largest, and zero."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 384, generator=draw) * torch.logspace(-4, 4, 64).unsqueeze(1)
    x[:, ::3] *= 1e-4
    x[5] = 0
    grouped = x.view(64, -1, group or 384)
    scale = (grouped.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    nearest = ((grouped / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)
    bound, off = rounding_of_rows(x, group), (x - nearest).abs()
    assert (off <= bound).all()
    ordinary = torch.arange(384) % 3 > 0
    assert (off / bound)[:, ordinary].nan_to_num().max() > 0.9
    assert (off / bound)[:, ~ordinary].nan_to_num().max() > 0.9


def test_interleaved_codes_are_those_of_planes_of_their_block():
    """Code 32 p + i of a block is in the bits from 4 p on of its word i; in half a block, code 16 p + i."""
    codes = torch.randint(16, (5, 448), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = codes[:, ::2] | codes[:, 1::2] << 4
    words = nibbles.interleaved(values)
    assert words.shape == (5, 112) and words.dtype == torch.int16
    for row, column in itertools.product(range(5), range(448)):
        size = 32 if column < 384 else 16
        plane, lane = column % 128 // size, column % size
        assert (int(words[row, 32 * (column // 128) + lane]) >> 4 * plane) & 15 == codes[row, column]
    assert torch.equal(nibbles.codes(words), codes) and torch.equal(nibbles.codes(values), codes)
    assert torch.equal(nibbles.paired(words), values) and nibbles.columns_of(words) == 448
    for columns in (64, 160):  # less than a block, and a quarter of one too many
        assert nibbles.interleaved(values[:, : columns // 2]).dtype == torch.uint8


@pytest.mark.parametrize("columns", [256, 192])
@pytest.mark.parametrize("format", [Int4(group=32), Codebook4(table="fp4", group=64)], ids=repr)
def test_a_matrix_in_four_bits_stands_for_the_same_as_it_is_arranged_on_devices(format, columns):
    """Whole, in rows and in columns, and moved back."""
    values = torch.randint(256, (6, columns // 2), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    scale = torch.rand(6, columns // format.group)
    parts = {"values": values, "scale": scale}
    away = {"values": nibbles.interleaved(values), "scale": cuda.arranged(scale)}
    assert format.shape(away) == (6, columns)
    matrix, x = format.dequantize(parts), torch.randn(3, columns)
    assert torch.equal(format.dequantize(away), matrix)
    assert torch.equal(Packed(format, away).rows(torch.tensor([4, 1])), matrix[[4, 1]])
    assert torch.equal(format.dequantize(format.columns(away, 64, 128)), matrix[:, 64:128])
    assert torch.equal(format.product(x, away), format.product(x, parts))
    meta = format.arranged({name: part.to("meta") for name, part in parts.items()})
    assert meta["values"].shape == away["values"].shape and meta["scale"].stride() == away["scale"].stride()
    back = format.arranged(away)
    assert all(torch.equal(back[name], part) and back[name].is_contiguous() for name, part in parts.items())


def test_scales_by_block_of_128_columns_lie_as_a_library_wants_them():
    """Column by column on a device; on a CPU row by row."""
    scale = torch.rand(48, 3)
    format = Fp8(group=128, rounds=True)
    for device, wanted in (("cpu", (3, 1)), ("meta", (1, 48))):
        parts = {"values": torch.empty(48, 384, device=device).to(torch.float8_e4m3fn), "scale": scale.to(device)}
        assert format.arranged(parts)["scale"].stride() == wanted
        assert format.arranged(parts)["scale"].shape == (48, 3)
    assert torch.equal(cuda.arranged(scale), scale)
    again = cuda.arranged(cuda.arranged(scale))
    assert again.stride() == (1, 48) and torch.equal(again, scale)


def test_rows_are_rounded_to_e4m3_where_it_gains_time(monkeypatch):
    """By the number of rows, the scales, and whether a library multiplies by block."""
    monkeypatch.setattr(cuda, "multiplies_blocks", lambda device: able)

    def rounded(count: int, group: int | None, rows: int = 64, columns: int = 384) -> bool:
        return cuda.rounds(torch.empty(count, columns), (rows, columns), group)

    able = True
    assert not rounded(16, 128) and not rounded(32, 128) and rounded(33, 128) and rounded(4096, 128)
    assert not rounded(64, None) and rounded(65, None)
    assert not rounded(4096, 64) and not rounded(4096, 128, columns=320) and not rounded(4096, 128, rows=70)
    able = False
    assert not rounded(4096, 128) and rounded(65, None)


def test_on_cuda_formats_stay_as_they_are_where_there_is_a_kernel(monkeypatch):
    """By the generation of the device, what activations are, and the size of groups."""
    monkeypatch.setattr(cuda, "can_compile", lambda device: True)
    generation = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(generation))
    where, bf16 = torch.device("cuda"), torch.bfloat16
    assert all(each.computes(where, bf16) for each in (Fp8(), Fp8(group=128), Int8(), Int4(group=32)))
    assert not any(each.computes(where, bf16) for each in (Ggml(), Codebook4(), Int4(group=8)))
    assert not any(each.computes(where, torch.float32) for each in (Fp8(), Int8(), Int4(group=32)))
    generation[:] = [8, 0]
    assert not Fp8().computes(where, bf16)
    assert Int4(group=32).computes(where, bf16)
    generation[:] = [7, 5]
    assert not Int4(group=32).computes(where, bf16)
    monkeypatch.setattr(cuda, "can_compile", lambda device: False)
    assert all(format.computes(torch.device("cpu"), dtype) for format in FORMATS for dtype in (bf16, torch.float32))
