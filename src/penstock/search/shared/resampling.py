"""Resampling: so many copies of each, in proportion to weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


def normalised(logs: Sequence[float]) -> list[float]:
    """Weights with the logarithms ``logs``, which add up to 1; all alike where none is finite."""
    top = max(logs, default=-math.inf)
    if not math.isfinite(top):
        return [1 / len(logs)] * len(logs)
    weights = [math.exp(each - top) for each in logs]
    return [each / sum(weights) for each in weights]


def log_mean(logs: Sequence[float]) -> float:
    """The logarithm of the mean of what has the logarithms ``logs``."""
    top = max(logs)
    return (
        top if not math.isfinite(top) else top + math.log(math.fsum(math.exp(each - top) for each in logs) / len(logs))
    )


def systematic(weights: Sequence[float], n: int, choose: Callable[[Sequence[float]], int]) -> list[int]:
    """How many copies of each of ``weights``, which add up to 1, ``n`` in all: one at each of n places at equal
    distances, of which ``choose`` picks the first. Each has n times its weight of copies on average, and is never off
    by one or more.

    What the first place decides changes only where a sum of weights is passed; so there are finitely many outcomes.
    """
    sums = list(itertools.accumulate(each * n for each in weights))
    cuts = sorted({0.0, 1.0, *(each - math.floor(each) for each in sums[:-1])})
    pieces = [(low, high) for low, high in itertools.pairwise(cuts) if high - low > 1e-12]
    low, high = pieces[choose([high - low for low, high in pieces])]
    first = (low + high) / 2
    below = [min(n, max(0, math.ceil(each - first))) for each in sums[:-1]] + [n]
    return [after - before for before, after in itertools.pairwise([0, *below])]


def effective(weights: Sequence[float]) -> float:
    """How many equal weights are worth as much as ``weights``, which add up to 1."""
    return 1 / math.fsum(each * each for each in weights)
