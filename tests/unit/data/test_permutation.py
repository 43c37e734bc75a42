from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.data.permutation import Permutation

SEEDS = st.integers(-(2**70), 2**70)


def chi_square(counts: np.ndarray) -> float:
    """How uneven ``counts`` are: chi-square as a standard normal deviate (Wilson and Hilferty's approximation)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    return float(((statistic / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


@given(n=st.integers(1, 100_000), seed=SEEDS, epoch=st.integers(0, 10))
def test_is_a_bijection(n, seed, epoch):
    permutation = Permutation(n, seed, epoch)
    every = np.arange(n)
    images = permutation(every)
    assert images.dtype == np.int64
    assert (np.sort(images) == every).all()


@given(data=st.data(), n=st.integers(1, 2**62), seed=SEEDS)
def test_stays_within_huge_domains_and_maps_no_two_to_one(data, n, seed):
    start = data.draw(st.integers(0, max(0, n - 1000)))
    permutation = Permutation(n, seed)
    images = permutation(np.arange(start, min(n, start + 1000)))
    assert ((images >= 0) & (images < n)).all()
    assert len(np.unique(images)) == len(images)


def test_does_not_depend_on_how_it_is_called():
    permutation = Permutation(1000, 3)
    every = permutation(np.arange(1000))
    assert [int(permutation(i)) for i in range(0, 1000, 97)] == every[::97].tolist()
    assert (permutation(np.arange(1000).reshape(10, 100)) == every.reshape(10, 100)).all()
    assert permutation(np.array([], np.int64)).shape == (0,)


def test_seeds_and_epochs_differ():
    every = np.arange(1000)
    images = [Permutation(1000, seed, epoch)(every) for seed in range(5) for epoch in range(5)]
    for i, a in enumerate(images):
        for b in images[:i]:
            # Two random permutations agree at one place on average.
            assert (a == b).sum() < 12


@pytest.mark.parametrize("n", [2, 3, 5, 16, 17, 100])
def test_every_image_is_equally_likely(n):
    """Over many seeds, each of the first, a middle and the last index goes everywhere equally often."""
    index = np.array([0, n // 2, n - 1])
    images = np.array([Permutation(n, seed)(index) for seed in range(100 * n if n < 20 else 25 * n)])
    for column in images.T:
        assert chi_square(np.bincount(column, minlength=n)) < 4


def test_every_order_of_a_few_elements_is_equally_likely():
    counts = Counter(tuple(Permutation(4, seed)(np.arange(4)).tolist()) for seed in range(3000))
    assert len(counts) == 24
    assert chi_square(np.array(list(counts.values()))) < 4


def test_neighbours_are_scattered():
    """On a large domain, images of consecutive integers and their differences spread evenly."""
    n = 10**9 + 7
    images = Permutation(n, 1)(np.arange(100_000))
    assert chi_square(np.bincount(images * 1000 // n, minlength=1000)) < 4
    steps = np.diff(images) % n
    assert chi_square(np.bincount(steps * 1000 // n, minlength=1000)) < 4


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_refuses_a_size_out_of_range(n):
    with pytest.raises(ValueError, match="permutation of"):
        Permutation(n, 0)


@pytest.mark.parametrize("index", [-1, 10])
def test_refuses_an_index_out_of_range(index):
    with pytest.raises(IndexError):
        Permutation(10, 0)(np.array([0, index]))
