"""Laws of repeated sampling: coverage, saturation, and what a verifier that may be wrong makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of ``k`` samples is right, from ``samples`` of which so many are
    right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021; [314]).

    Raises:
        ValueError: there are fewer than ``k`` samples, or more right ones than samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"{right} right of {samples} samples give no estimate for {k}")
    if samples - right < k:
        return 1.0
    return 1 - math.prod(1 - k / left for left in range(samples - right + 1, samples + 1))


def coverage(counts: Sequence[tuple[int, int]], k: int) -> float:
    """The mean of :func:`pass_at_k` over problems, given (samples, right) of each."""
    return sum(pass_at_k(samples, right, k) for samples, right in counts) / len(counts)


def power_law(ks: Sequence[int], covered: Sequence[float]) -> tuple[float, float]:
    """(a, b) of coverage c(k) = exp(a k^b), fitted by least squares to log(-log c) = log(-a) + b log k; points with a
    coverage of 0 or 1 say nothing, and are left out.

    Raises:
        ValueError: fewer than two points say something.
    """
    points = [(math.log(k), math.log(-math.log(c))) for k, c in zip(ks, covered, strict=True) if 0 < c < 1]
    if len(points) < 2:
        raise ValueError("two values of k with a coverage between 0 and 1 are needed")
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    return -math.exp(intercept), float(slope)


def saturation(ceiling: float, rate: float, threshold: float) -> int:
    """The first n after which one more gains less than ``threshold``: ceiling rate (1 - rate)^n < threshold ([350])."""
    if ceiling * rate < threshold:
        return 0
    if rate >= 1:
        return 1
    n = max(0, math.floor(math.log(threshold / (ceiling * rate)) / math.log(1 - rate)) - 1)
    while ceiling * rate * (1 - rate) ** n >= threshold:
        n += 1
    return n


def fit_saturation(ns: Sequence[int], accuracies: Sequence[float]) -> tuple[float, float]:
    """(ceiling, rate) of F(n) = ceiling (1 - (1 - rate)^n), the accuracy after ``n`` samples ([350]; the form is from
    knowledge), by least squares with a ceiling of 1 at most: for each rate the error is a parabola of the ceiling,
    whose lowest point within the bounds is the nearest to its own, and the rate is searched for, ever more finely.

    Raises:
        ValueError: fewer than two points.
    """
    if len(ns) < 2:
        raise ValueError("two points are needed")
    counts, wanted = np.array(ns, float), np.array(accuracies)
    low, high = 1e-6, 1.0
    for _ in range(12):
        rates = np.linspace(low, high, 101)
        shapes = 1 - (1 - rates[:, None]) ** counts
        ceilings = np.clip((shapes @ wanted) / (shapes * shapes).sum(1), 0, 1)
        errors = ((ceilings[:, None] * shapes - wanted) ** 2).sum(1)
        place = int(errors.argmin())
        low, high = rates[max(place - 1, 0)], rates[min(place + 1, 100)]
    return float(ceilings[place]), float(rates[place])


#: Of a problem: samples, those of them that are right and accepted, and those that are wrong and accepted.
Accepted = tuple[int, int, int]


def settled(counts: Sequence[Accepted], tries: int) -> tuple[float, float, float]:
    """(right, wrong, drawn): how often the first sample that a verifier accepts among ``tries`` is right, how often
    wrong, and how many are drawn, the mean over problems ([344]: resampling as a geometric process; the estimate is
    ours). Of a problem it is the mean over all orders of its samples, which is unbiased: one is accepted with
    :func:`pass_at_k`, and is any of the accepted ones alike.

    Raises:
        ValueError: a problem has fewer than ``tries`` samples.
    """
    right = wrong = drawn = 0.0
    for samples, good, bad in counts:
        found = [0.0, *(pass_at_k(samples, good + bad, k) for k in range(1, tries + 1))]
        if found[-1]:
            right += found[-1] * good / (good + bad)
            wrong += found[-1] * bad / (good + bad)
        drawn += sum(1 - each for each in found[:-1])
    return right / len(counts), wrong / len(counts), drawn / len(counts)


def ceiling(counts: Sequence[Accepted]) -> float:
    """The share of problems that any number of tries comes to answer right: the mean of good / (good + bad), and 0
    where none is accepted ([344])."""
    return sum(good / (good + bad) if good else 0.0 for _, good, bad in counts) / len(counts)


def best_tries(counts: Sequence[Accepted], cost: float, price: float) -> int:
    """How many tries are worth most where a right answer is worth 1, a wrong one -``cost``, none 0, and a sample costs
    ``price`` ([344]; what a sample costs is ours), of 0 to as many as each problem has; of equals, the fewest."""

    def worth(tries: int) -> float:
        right, wrong, drawn = settled(counts, tries)
        return right - cost * wrong - price * drawn

    # Sums of many terms: what differs by less than their rounding is equal.
    return max(range(min(samples for samples, _, _ in counts) + 1), key=lambda tries: (round(worth(tries), 12), -tries))
