"""Batches that go on by themselves: what comes of each token is what comes of it when it is planned anew."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from penstock.core.randomness import numpy_generator
from penstock.ops.paged.contract import CacheShape, PagedBatch, PagedCache, StepShape
from penstock.ops.paged.cpu import NativeCache
from penstock.ops.paged.reference import ReferenceCache

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

BLOCKS, SIZE, PAGES, HEADS, KV, DIM = 300, 16, 72, 4, 2, 16


def walked(shape: CacheShape) -> PagedCache:
    import interpreted
    from penstock.ops.paged.invariant import WalkedCache

    if interpreted.OBSTACLE:
        pytest.skip(interpreted.OBSTACLE)
    return WalkedCache(shape)


def native(shape: CacheShape) -> PagedCache:
    if torch.cuda.is_available():
        pytest.skip("it is a CPU's")
    return NativeCache(shape)


def batch_of(tables: Tensor, lengths: list[int], shape: StepShape | None) -> PagedBatch:
    slots = [
        int(table[(n - 1) // SIZE]) * SIZE + (n - 1) % SIZE if n else 0
        for table, n in zip(tables, lengths, strict=True)
    ]
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    counts = torch.tensor(lengths, dtype=torch.int32)
    return PagedBatch(starts, counts, tables, torch.tensor(slots), shape=shape)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("opened", [ReferenceCache, walked, pytest.param(native, marks=needs_compiler)])
def test_a_batch_that_goes_on_attends_as_one_that_is_planned_anew(opened, window):
    """Some stay behind; some come to another block, and to keys that no item of their plan had before."""
    draw, device = numpy_generator(0, "onward"), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = CacheShape(1, HEADS, KV, DIM, BLOCKS + 1, SIZE, torch.float32, device, frozenset({window}))
    going, planned = (opened(shape) for _ in range(2))
    fixed = StepShape(4, onward=5)
    going.fix([fixed], PAGES)
    lengths, left = [1021, 1, 47, 200], [6, 4, 2, 1]  # over 1,024 there is another piece, and another block
    order = draw.permutation(BLOCKS)[: 4 * PAGES].reshape(4, PAGES).astype(np.int32)
    tables = torch.from_numpy(order)
    keys = torch.from_numpy(draw.normal(size=(2, 1, KV, BLOCKS * SIZE, DIM))).float().to(device)
    for cache in (going, planned):
        cache.put(torch.arange(BLOCKS * SIZE), list(keys))
    going.plan(batch_of(tables, lengths, fixed))
    places = torch.tensor(lengths, device=device) - 1
    for number in range(max(left)):
        given = [torch.from_numpy(draw.normal(size=(4, each, DIM))).float().to(device) for each in (HEADS, KV, KV)]
        alive = [index for index, count in enumerate(left) if count > number]
        planned.plan(batch_of(tables[alive], [lengths[index] + number for index in alive], None))
        found, wanted = (
            cache.attend(0, *(each[rows] for each in given), scale=DIM**-0.5, window=window)
            for cache, rows in ((going, slice(None)), (planned, alive))
        )
        torch.testing.assert_close(found[alive], wanted)
        more = torch.tensor([count > number + 1 for count in left], device=device)
        places += more
        going.advance(places, more, BLOCKS * SIZE)
    slots = torch.arange(BLOCKS * SIZE)
    for own, other in zip(going.codes(slots), planned.codes(slots), strict=True):
        assert torch.equal(own, other)
