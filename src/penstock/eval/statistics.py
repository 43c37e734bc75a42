"""Intervals around results, and tests of differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from penstock.core.randomness import numpy_generator

#: The share of intervals that hold the true value.
LEVEL = 0.95

#: Sets of samples that a bootstrap draws.
DRAWS = 4000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure with the interval that holds the true one, at :data:`LEVEL`, and how that was found."""

    value: float
    low: float
    high: float
    method: str


def estimate(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The sum of ``values`` over that of ``weights``: where samples are right or wrong, with Wilson's interval, else
    with one of the bootstrap."""
    if set(values) <= {0.0, 1.0} and set(weights) <= {1.0}:
        return wilson(int(sum(values)), len(values))
    return bootstrap(values, weights)


def wilson(right: int, count: int) -> Estimate:
    """The share of ``right`` among ``count`` with Wilson's score interval (1927), which stays within 0 and 1 and says
    something of no right one too."""
    z = float(stats.norm.ppf((1 + LEVEL) / 2))
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), "Wilson")


def bootstrap(values: Sequence[float], weights: Sequence[float]) -> Estimate:
    """The sum of ``values`` over that of ``weights`` with the interval of the percentile bootstrap (Efron 1979): the
    samples are drawn anew, with their weights, again and again."""
    value, weight = np.asarray(values, float), np.asarray(weights, float)
    picked = _drawn(len(value))
    low, high = np.quantile(value[picked].sum(1) / weight[picked].sum(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value.sum() / weight.sum()), float(low), float(high), "bootstrap")


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much a second result lies above a first one on the same samples.

    Attributes:
        change: the difference, with an interval.
        p: how probable a difference of at least this size would be, if there were none.
        test: which test says so.
    """

    change: Estimate
    p: float
    test: str


def difference(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Difference:
    """Compares two lists of values on the same samples. The interval is a paired bootstrap's; the test is McNemar's,
    exact, where samples are right or wrong, else the paired t test of ``value / weight``."""
    one, other, weight = np.asarray(first, float), np.asarray(second, float), np.asarray(weights, float)
    change = bootstrap((other - one).tolist(), weights)
    if set(first) | set(second) <= {0.0, 1.0}:
        lost, won = int((one > other).sum()), int((one < other).sum())
        return Difference(change, mcnemar(lost, won), "McNemar, exact")
    return Difference(change, paired_t((one / weight).tolist(), (other / weight).tolist()), "paired t")


def mcnemar(lost: int, won: int) -> float:
    """The probability that of so many samples with different results, each of which is as probably lost as won, as few
    as these or fewer fall on one side (McNemar 1947, with the exact binomial distribution)."""
    return float(stats.binomtest(won, won + lost, 0.5).pvalue) if won + lost else 1.0


def paired_t(first: Sequence[float], second: Sequence[float]) -> float:
    """The p-value of Student's paired t test; 1 where nothing differs."""
    apart = np.asarray(second, float) - np.asarray(first, float)
    if len(apart) < 2 or not apart.any():
        return 1.0
    if apart.std() == 0:  # the same difference everywhere
        return 0.0
    return float(stats.ttest_1samp(apart, 0.0).pvalue)


def _drawn(count: int) -> np.ndarray:
    """Places of samples, [DRAWS, count]."""
    return numpy_generator(0, "eval/bootstrap").integers(count, size=(DRAWS, count))
