"""What single codecs of the cache are said to do."""

from __future__ import annotations

import pytest
import torch

from penstock.ops.paged.codecs.int8 import Int8
from penstock.ops.paged.contract import CacheShape, PagedBatch
from penstock.ops.paged.cpu import Native
from penstock.ops.paged.reference import Reference
from penstock.policy import create

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("plain", torch.float32, 256),
        ("plain", torch.bfloat16, 128),
        ("bf16", torch.float32, 128),
        ("int8", torch.float32, 68),
        ("int8", torch.bfloat16, 68),
        ("fp8", torch.bfloat16, 64),
        ("int4", torch.float32, 40),
        ("coupled", torch.float32, 16),
    ],
)
def test_a_vector_of_64_numbers_takes_so_many_bytes(name, dtype, wanted):
    codec = create("kv.codec", name)
    assert codec.vector_bytes(64, dtype) == wanted
    shape = CacheShape(30, 9, 3, 64, 1, 16, dtype, CPU, codec=codec)
    assert shape.block_bytes == 30 * 2 * 3 * 16 * wanted


def test_an_integer_is_within_half_a_step_of_its_number():
    vectors = torch.randn(100, 2, 64, generator=torch.Generator().manual_seed(0))
    codec, step = Int8(), vectors.abs().amax(-1, keepdim=True) / 127
    off = (codec.decode(codec.encode(vectors), 64, torch.float32) - vectors).abs()
    assert (off <= 0.5001 * step).all()
    assert off.max() > 0.49 * step.max()
    assert (codec.bound(vectors.double()) <= 0.5002 * step + 1e-30).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_writes_the_codes_of_the_definition(dtype):
    draw, codec = torch.Generator().manual_seed(0), Int8()
    shape = CacheShape(1, 2, 2, 20, 5, 8, dtype, CPU, codec=codec)
    key, value = (torch.randn(40, 2, 20, generator=draw).to(dtype) for _ in range(2))
    key[7], value[9, 1, 3], key[11, 0, 0] = 0, torch.inf, torch.nan
    tables, slots = torch.arange(5, dtype=torch.int32)[None], torch.arange(40)
    caches = [policy.open(shape) for policy in (Native(), Reference()) if policy.refuses(shape) is None]
    for cache in caches:
        cache.plan(PagedBatch(torch.tensor([0, 40]).int(), torch.tensor([40]).int(), tables, slots))
        cache.attend(0, torch.zeros(40, 2, 20, dtype=dtype), key, value, scale=1.0, window=None)
        for own, vectors in zip(cache.codes(slots), (key, value), strict=True):
            found = codec.decode(own[0].transpose(0, 1), 20, torch.float32)
            wanted = codec.decode(codec.encode(vectors), 20, torch.float32)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
