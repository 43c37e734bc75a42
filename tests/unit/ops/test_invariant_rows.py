"""Rows have the same bits in any number, at any place, on any number of threads; and are what they should be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.core.randomness import torch_generator
from penstock.ops import native
from penstock.ops.cuts import draw_cut
from penstock.ops.grouped import grouped_linear
from penstock.ops.invariant import (
    SOURCE,
    in_pieces,
    invariant_grouped_linear,
    invariant_linear,
    invariant_rms_norm,
    invariant_swiglu,
    invariant_turns,
)

try:
    native.load(SOURCE)
except PenstockError as error:
    pytest.skip(error.what, allow_module_level=True)

#: Of the result relative to the largest, by dtype: its own rounding, or that of sums of thousands.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8}
COUNT = 37


def rows(size: int, dtype: torch.dtype, count: int = COUNT, name: str = "x") -> torch.Tensor:
    return torch.randn(count, size, generator=torch_generator(0, name), dtype=torch.float64).to(dtype)


def same_bits(function, x: torch.Tensor, start: int, stop: int, threads: int) -> torch.Tensor:
    """Asserts that some of the rows come out as they do among all of them; returns all."""
    whole = function(x)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(function(x[start:stop]), whole[start:stop])
        assert torch.equal(function(x.flip(0)).flip(0), whole)
    finally:
        torch.set_num_threads(1)
    return whole


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    atol = TOLERANCES[got.dtype] * float(wanted.abs().max())
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=atol)


PLACES = {"start": st.integers(0, COUNT - 1), "count": st.integers(1, COUNT), "threads": st.integers(1, 4)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=20)
@given(size=st.one_of(st.integers(1, 80), st.integers(1000, 2100)), height=st.integers(1, 130), **PLACES)
def test_linear(dtype, size, height, start, count, threads):
    x, weight, bias = rows(size, dtype), rows(size, dtype, height, "weight"), rows(height, dtype, 1, "bias")[0]
    got = same_bits(lambda some: invariant_linear(some, weight, bias), x, start, start + count, threads)
    close(got, F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_a_grouped_product_is_a_product_for_each_group(dtype, sizes):
    x, weight = rows(50, dtype, sum(sizes)), rows(50, dtype, 13 * len(sizes), "weight").view(len(sizes), 13, 50)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    got = invariant_grouped_linear(x, weight, ends)
    each = [invariant_linear(own, matrix) for own, matrix in zip(x.split(sizes), weight, strict=True)]
    assert torch.equal(got, torch.cat(each))
    torch.testing.assert_close(got.double(), grouped_linear(x.double(), weight.double(), ends), rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=20)
@given(size=st.integers(1, 200), **PLACES)
def test_norm(dtype, size, start, count, threads):
    x, weight = rows(size, dtype), rows(size, dtype, 1, "weight")[0]
    got = same_bits(lambda some: invariant_rms_norm(some, weight, 1e-5), x, start, start + count, threads)
    close(got, F.rms_norm(x.double(), (size,), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCES)
@settings(max_examples=20)
@given(size=st.integers(1, 200), **PLACES)
def test_swiglu(dtype, size, start, count, threads):
    x = 3 * rows(2 * size, dtype)
    gate, up = x.double().chunk(2, -1)
    close(same_bits(invariant_swiglu, x, start, start + count, threads), F.silu(gate) * up)


def test_swiglu_far_from_zero():
    gate = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30, torch.nan])
    got = invariant_swiglu(torch.cat([gate, torch.ones(10)]))
    torch.testing.assert_close(got, F.silu(gate.double()).float(), rtol=1e-6, atol=1e-30, equal_nan=True)


@given(**PLACES)
def test_angles(start, count, threads):
    x = 5000 * rows(10, torch.float32)
    for which, function in enumerate((torch.cos, torch.sin)):
        got = same_bits(lambda some, which=which: invariant_turns(some)[which], x, start, start + count, threads)
        torch.testing.assert_close(got.double(), function(x.double()), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [33, 700, 40000])
@given(**PLACES)
@settings(max_examples=5)
def test_what_libraries_compute_row_by_row_has_the_same_bits_one_row_at_a_time(size, start, count, threads):
    """Log-probabilities, distributions and draws, in pieces of one row; of a long one threads have shares, so their
    number must stay the same."""
    logits, heat = 4 * rows(size, torch.float32, 12), torch.full((12,), 0.8, dtype=torch.float64)
    uniform = torch.rand(12, generator=torch_generator(0, "uniform"), dtype=torch.float64)
    start, stop = start % 12, start % 12 + count

    def chosen(some: torch.Tensor, hot: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = torch.stack([hot, 0 * hot, 1 + 0 * hot, 0 * hot, number])
        return some.log_softmax(-1), draw_cut(some, plain), draw_cut(some, plain.index_fill(0, torch.tensor([2]), 0.9))

    torch.set_num_threads(threads)
    try:
        whole = in_pieces(chosen, logits, heat, uniform, size=1)
        part = in_pieces(chosen, logits[start:stop], heat[start:stop], uniform[start:stop], size=1)
    finally:
        torch.set_num_threads(1)
    for own, among in zip(part, whole, strict=True):
        assert torch.equal(own, among[start:stop])


def test_pieces_are_of_one_size():
    seen = []
    (out,) = in_pieces(lambda some: (seen.append(len(some)), some + 1)[1:], torch.arange(10.0), size=4)
    assert seen == [4, 4, 4]
    assert torch.equal(out, torch.arange(1.0, 11))
