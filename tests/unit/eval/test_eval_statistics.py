"""Intervals and tests, beside closed forms, scipy's own, and counts by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from penstock.eval.statistics import bootstrap, difference, estimate, mcnemar, paired_t, wilson


@pytest.mark.parametrize(("right", "count"), [(0, 1), (0, 50), (1, 3), (37, 100), (100, 100)])
def test_wilsons_interval_is_that_of_scipy(right, count):
    wanted = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    found = wilson(right, count)
    assert (found.value, found.low, found.high) == pytest.approx((right / count, wanted.low, wanted.high), abs=1e-12)


def test_the_bootstrap_of_a_ratio_is_that_of_all_resamples():
    """Of three samples there are 27."""
    values, weights = [10.0, 4.0, 9.0], [5.0, 4.0, 3.0]
    sets = [list(picked) for picked in itertools.product(range(3), repeat=3)]
    ratios = [sum(values[i] for i in picked) / sum(weights[i] for i in picked) for picked in sets]
    found = bootstrap(values, weights)
    assert found.value == pytest.approx(23 / 12)
    assert found.low == pytest.approx(np.quantile(ratios, 0.025, method="inverted_cdf"), abs=0.02)
    assert found.high == pytest.approx(np.quantile(ratios, 0.975, method="inverted_cdf"), abs=0.02)


def test_the_bootstrap_of_many_is_nearly_normal():
    values = np.random.default_rng(0).normal(2.0, 0.5, size=2000)
    found = bootstrap(values.tolist(), [1.0] * 2000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_right_and_wrong_have_wilsons_interval_and_other_figures_a_bootstrap():
    assert estimate([1.0, 0.0], [1.0, 1.0]).method == "Wilson"
    assert estimate([1.0, 0.0], [1.0, 2.0]).method == "bootstrap"
    assert estimate([0.5, 0.0], [1.0, 1.0]).method == "bootstrap"


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (0, 5), (3, 4), (9, 1), (2, 2)])
def test_mcnemar_is_a_count_of_all_outcomes(lost, won):
    """Every way in which the samples that differ could have fallen, each as probable."""
    n = lost + won
    as_extreme = sum(abs(2 * sum(fallen) - n) >= abs(won - lost) for fallen in itertools.product((0, 1), repeat=n))
    assert mcnemar(lost, won) == pytest.approx(as_extreme / 2**n)


def test_the_paired_t_test_is_scipys():
    draw = np.random.default_rng(1)
    one = draw.normal(size=20)
    other = one + draw.normal(0.3, 0.5, size=20)
    assert paired_t(one.tolist(), other.tolist()) == pytest.approx(stats.ttest_rel(one, other).pvalue)
    assert paired_t([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert paired_t([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) == 0.0


def test_a_difference_says_its_sign_and_its_test():
    found = difference([0.0] * 10, [1.0] * 8 + [0.0] * 2, [1.0] * 10)
    assert (found.change.value, found.test) == (pytest.approx(0.8), "McNemar, exact")
    assert found.p == pytest.approx(2 / 2**8)
    found = difference([10.0, 20.0, 31.0], [9.0, 17.0, 26.0], [10.0, 10.0, 10.0])
    assert found.change.value == pytest.approx(-9 / 30)
    assert found.test == "paired t"
    assert found.p == pytest.approx(stats.ttest_rel([1.0, 2.0, 3.1], [0.9, 1.7, 2.6]).pvalue)
