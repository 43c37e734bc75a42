"""The law of ``data.sampler``.

Bugs that its clauses are there to catch:

- epochs: a sample that comes twice or never, in an epoch that is not the first, or for a size that is no power of two.
- draws: the same order in every epoch, or for every seed, of a sampler that says that it draws it; another one of a
  sampler that does not.
- cuts: an order that depends on how many are asked for at a time, or on what was asked before, so that a resumed run
  sees other samples; an index out of range at the seam of two epochs, or beyond 32 bits.
"""

from __future__ import annotations

import numpy as np

from penstock.core.randomness import numpy_generator
from penstock.data.samplers.contract import Sampler
from penstock.testing.enrolled import rebuilt


def check(sampler: Sampler) -> None:
    """Asserts the law of ``data.sampler`` for random sizes, seeds and positions."""
    rebuilt(sampler)
    draw = numpy_generator(0, "testing/data.sampler")
    for size in (1, 2, 3, 7, 16, 100, 1999, *draw.integers(1, 2000, 20).tolist()):
        check_epoch(sampler, size, seed=int(draw.integers(2**62)), epoch=int(draw.integers(1000)))
    check_draws(sampler)
    for size in (1, 2, 5, 13, 50, 10**9, 10**12, *draw.integers(1, 50, 20).tolist()):
        counts = draw.integers(0, 40, draw.integers(2, 7)).tolist()
        check_cuts(sampler, size, seed=int(draw.integers(10)), start=int(10 ** draw.uniform(0, 12)), counts=counts)


def check_epoch(sampler: Sampler, size: int, seed: int, epoch: int) -> None:
    """Each sample comes once."""
    indices = sampler.indices(epoch * size, size, size, seed)
    assert indices.dtype == np.int64, f"indices are {indices.dtype}"
    assert np.sort(indices).tolist() == list(range(size)), f"epoch {epoch} of {size} samples is no permutation of them"


def check_draws(sampler: Sampler, size: int = 50) -> None:
    """Epochs and seeds have orders of their own where they are drawn, and else they have one."""
    several = ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2))
    orders = {tuple(sampler.indices(epoch * size, size, size, seed).tolist()) for epoch, seed in several}
    wanted = len(several) if sampler.drawn else 1
    assert len(orders) == wanted, f"pairs of an epoch and a seed have {len(orders)} orders, and {wanted} are said"


def check_cuts(sampler: Sampler, size: int, seed: int, start: int, counts: list[int]) -> None:
    """A run resumed at any position, in pieces of any size, across epochs, sees what an unbroken one sees."""
    whole = sampler.indices(start, sum(counts), size, seed)
    ends = start + np.cumsum([0, *counts])
    pieces = [rebuilt(sampler).indices(int(end), count, size, seed) for end, count in zip(ends, counts, strict=False)]
    assert whole.tolist() == [i for piece in pieces for i in piece.tolist()], f"cut into {counts}, the order changes"
    assert ((whole >= 0) & (whole < size)).all(), "an index is out of range"
