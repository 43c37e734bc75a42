"""What only the native kernel promises: even shares of any batch for any number of threads, and no wild writes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.ops.paged.codecs.fp8 import Fp8
from penstock.ops.paged.contract import CacheShape, PagedBatch
from penstock.ops.paged.cpu import Native, NativeCache
from penstock.testing.paged_scene import Scene, Step, softmax_attention

CPU = torch.device("cpu")

if (reason := Native().serves(CPU, torch.float64, 16)) is not None:
    pytest.skip(reason, allow_module_level=True)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    threads=st.integers(2, 9),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3, 8]),
    window=st.sampled_from([None, 300]),
)
def test_cuts_through_sequences_and_heads_are_merged_exactly(lengths, threads, kv_heads, groups, window):
    """Few long sequences on many threads: most tiles are cut, some more than once."""
    blocks = sum(length // 16 + 3 for length in lengths)
    shape = CacheShape(1, groups * kv_heads, kv_heads, 16, blocks, 16, torch.float64, CPU, frozenset({window}))
    scene = Scene(Native(), shape, (window,), tolerance=1e-14)
    torch.set_num_threads(threads)
    try:
        scene.play((Step(tuple(enumerate(lengths))), Step(tuple((n, 1) for n in range(len(lengths))))))
    finally:
        torch.set_num_threads(1)


def one_sequence(length: int, blocks: int) -> PagedBatch:
    """A prompt in the first blocks of the pool."""
    return PagedBatch(
        starts=torch.tensor([0, length], dtype=torch.int32),
        lengths=torch.tensor([length], dtype=torch.int32),
        tables=torch.arange(blocks, dtype=torch.int32).unsqueeze(0),
        slots=torch.arange(length),
    )


def small_cache(dtype: torch.dtype = torch.float32) -> NativeCache:
    return NativeCache(CacheShape(1, 2, 1, 8, 3, 4, dtype, CPU))


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": torch.tensor([0, 1, 2, 3, 12])},
        {"slots": torch.tensor([0, 1, 2, 3, -1])},
        {"tables": torch.tensor([[0, 3, 0]], dtype=torch.int32)},
        {"tables": torch.tensor([[-1, 1, 0]], dtype=torch.int32)},
        {"lengths": torch.tensor([13], dtype=torch.int32)},
        {"lengths": torch.tensor([4], dtype=torch.int32)},
    ],
    ids=["slot above", "slot below", "block above", "block below", "longer than its table", "fewer than are new"],
)
def test_a_batch_outside_the_memory_is_refused(wrong):
    with pytest.raises(IndexError, match="sequence 0 of the batch"):
        small_cache().plan(dataclasses.replace(one_sequence(5, 3), **wrong))


def test_tensors_that_do_not_fit_the_batch_are_refused():
    cache = small_cache()
    cache.plan(one_sequence(5, 3))
    with pytest.raises(ValueError, match="do not fit"):
        cache.attend(0, torch.ones(6, 2, 8), torch.ones(6, 1, 8), torch.ones(6, 1, 8), scale=1.0, window=None)


def test_any_strides_are_welcome():
    cache = small_cache(torch.float64)
    cache.plan(one_sequence(5, 3))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(8, h, 5, generator=draw, dtype=torch.float64).permute(2, 1, 0) for h in (2, 1, 1))
    out = cache.attend(0, query, key, value, scale=1.0, window=None)
    torch.testing.assert_close(out, softmax_attention(query, key, value, scale=1.0, window=None), rtol=0, atol=1e-14)


def test_bfloat16_is_rounded_once():
    """With float32 sums, the only error is the rounding of the output: half a unit in its last place of 8 bits."""
    cache = small_cache(torch.bfloat16)
    cache.plan(one_sequence(12, 3))
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(12, h, 8, generator=draw).bfloat16() for h in (2, 1, 1))
    out = cache.attend(0, query, key, value, scale=1.0, window=None)
    wanted = softmax_attention(query.double(), key.double(), value.double(), scale=1.0, window=None)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_in_fp8_are_written_and_read_as_the_codec_says(dtype):
    """All codes as values, and numbers of all sizes as keys, each a token that sees itself alone."""
    draw, scales = torch.Generator().manual_seed(0), torch.tensor([[[0.013], [0.25]]])
    cache = NativeCache(CacheShape(1, 2, 1, 8, 256, 1, dtype, CPU, codec=Fp8(), learned=scales))
    codes = torch.arange(256, dtype=torch.int64).repeat(8).view(8, 256).T.to(torch.uint8).unsqueeze(1)
    value = Fp8().decode(codes, 8, dtype, scales[0, 1])
    key = torch.randn(256, 1, 8, generator=draw) * torch.logspace(-6, 3, 256).view(-1, 1, 1)
    key[7, 0, 3], key[9, 0, 1], key[11, 0, 0] = torch.inf, -torch.inf, torch.nan
    key[20:30] = torch.arange(80).view(10, 1, 8) * 0.013 * 2.0**-10  # ties among the smallest
    count, key = torch.arange(257, dtype=torch.int32), key.to(dtype)
    cache.plan(PagedBatch(count, count.diff(), count[:256, None], torch.arange(256)))
    out = cache.attend(0, torch.zeros(256, 2, 8, dtype=dtype), key, value, scale=1.0, window=None)
    seen = torch.where(key.isfinite().all(-1, keepdim=True), value, torch.nan).expand(-1, 2, -1)
    torch.testing.assert_close(out, seen, rtol=0, atol=0, equal_nan=True)
    written = cache.codes(torch.arange(256))
    for part, vectors in enumerate((key, value)):
        wanted = Fp8().encode(vectors, scales[0, part])
        same = written[part][0, 0] == wanted[:, 0]
        assert (same | (wanted[:, 0] & 127 == 127) & (written[part][0, 0] & 127 == 127)).all()
