"""Laws of repeated sampling, against enumeration and planted values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from penstock.search import coverage as laws
from penstock.search.programs.saturation import Saturation


def test_pass_at_k_is_the_mean_over_all_subsets():
    for samples in range(1, 8):
        for right in range(samples + 1):
            for k in range(1, samples + 1):
                found = [any(place < right for place in chosen) for chosen in itertools.combinations(range(samples), k)]
                assert laws.pass_at_k(samples, right, k) == pytest.approx(sum(found) / len(found))


def test_pass_at_k_is_unbiased():
    """Over all outcomes of n samples, each right with the chance p: 1 - (1 - p)^k."""
    n, p = 9, 0.23
    for k in (1, 3, 9):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * laws.pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize("wrong", [(3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)])
def test_what_gives_no_estimate_is_refused(wrong):
    with pytest.raises(ValueError, match="give no estimate"):
        laws.pass_at_k(*wrong)


def test_coverage_of_problems_with_beta_distributed_chances():
    """The closed form 1 - B(a, b + k) / B(a, b), by a mean over a fine grid of the distribution."""
    a, b, k = 0.8, 3.0, 5
    grid = (np.arange(200_000) + 0.5) / 200_000
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    mean = float((density * (1 - (1 - grid) ** k)).sum() / density.sum())
    beta = lambda x, y: math.gamma(x) * math.gamma(y) / math.gamma(x + y)  # noqa: E731
    assert mean == pytest.approx(1 - beta(a, b + k) / beta(a, b), abs=1e-3)
    counts = [(60, round(60 * chance)) for chance in np.random.default_rng(0).beta(a, b, 4000)]
    assert laws.coverage(counts, k) == pytest.approx(mean, abs=0.015)


def test_a_planted_power_law_is_found():
    ks = [1, 2, 4, 8, 16, 64]
    a, b = laws.power_law([*ks, 1000], [*(math.exp(-1.7 * k**-0.45) for k in ks), 1.0])
    assert (a, b) == (pytest.approx(-1.7), pytest.approx(-0.45))
    with pytest.raises(ValueError, match="two values of k"):
        laws.power_law([1, 2], [0.0, 1.0])


def saturating(ceiling: float, rate: float, n: int) -> float:
    """Accuracy after ``n`` samples."""
    return ceiling * (1 - (1 - rate) ** n)


def test_the_saturation_point_is_the_first_below_the_threshold():
    for ceiling, rate, threshold in (
        (0.9, 0.2, 0.01),
        (0.5, 0.03, 0.001),
        (0.7, 0.9, 0.05),
        (0.3, 0.1, 0.2),
        (1, 1, 0.1),
    ):
        gain = lambda n: saturating(ceiling, rate, n + 1) - saturating(ceiling, rate, n)  # noqa: B023, E731
        wanted = next(n for n in range(1000) if gain(n) < threshold)
        assert laws.saturation(ceiling, rate, threshold) == wanted


def test_planted_saturation_is_found():
    ns = [1, 2, 4, 8, 16, 32]
    found = laws.fit_saturation(ns, [saturating(0.83, 0.17, n) for n in ns])
    assert found == (pytest.approx(0.83, abs=1e-6), pytest.approx(0.17, abs=1e-6))


@pytest.mark.parametrize("accuracies", [(0.06, 0.12, 0.25, 0.5), (0.001, 0.002, 0.004, 0.008), (0.3, 0.5, 0.8, 0.99)])
def test_no_ceiling_above_one_is_fitted(accuracies):
    """Against all pairs of a fine grid; without a bound, those that still double are fitted by a rate of nothing."""
    ns = np.array([1, 2, 4, 8])
    error = lambda ceiling, rate: ((ceiling * (1 - (1 - rate) ** ns) - accuracies) ** 2).sum()  # noqa: E731
    ceiling, rate = laws.fit_saturation(ns.tolist(), accuracies)
    assert 0 < ceiling <= 1 and 0 < rate <= 1
    least = min(error(c, r) for c in np.linspace(0, 1, 51) for r in np.geomspace(1e-4, 1, 200))
    assert error(ceiling, rate) <= least + 1e-12
    printed = {"ceiling": float(f"{ceiling:.3g}"), "rate": float(f"{rate:.3g}")}
    assert Saturation(**printed).rate > 0  # the program takes what is printed


def first_accepted(samples: int, good: int, bad: int, tries: int) -> tuple[float, float, float]:
    """Right, wrong and drawn, over all orders of the samples."""
    kinds = "g" * good + "b" * bad + "-" * (samples - good - bad)
    right = wrong = drawn = 0
    orders = list(itertools.permutations(kinds))
    for order in orders:
        accepted = next((place for place, kind in enumerate(order[:tries]) if kind != "-"), None)
        right += accepted is not None and order[accepted] == "g"
        wrong += accepted is not None and order[accepted] == "b"
        drawn += tries if accepted is None else accepted + 1
    return right / len(orders), wrong / len(orders), drawn / len(orders)


#: Problems that differ: often right, often wrongly accepted, never accepted, nearly always.
MIX = [(6, 2, 1), (6, 1, 3), (6, 0, 0), (6, 4, 1), (6, 0, 2)]


def test_what_is_accepted_first_is_the_mean_over_all_orders():
    for tries in range(1, 7):
        wanted = np.mean([first_accepted(*each, tries) for each in MIX], axis=0)
        assert laws.settled(MIX, tries) == pytest.approx(tuple(wanted))


def test_what_is_accepted_first_is_an_unbiased_estimate():
    """Of draws that are right and accepted with the chance p, wrong and accepted with f: a geometric process."""
    n, p, f, tries = 7, 0.2, 0.3, 4
    chance = lambda g, b: (  # noqa: E731
        math.comb(n, g) * math.comb(n - g, b) * p**g * f**b * (1 - p - f) ** (n - g - b)
    )
    outcomes = [(g, b) for g in range(n + 1) for b in range(n + 1 - g)]
    found = sum(chance(g, b) * np.array(laws.settled([(n, g, b)], tries)) for g, b in outcomes)
    reached = 1 - (1 - p - f) ** tries
    assert tuple(found) == pytest.approx((p / (p + f) * reached, f / (p + f) * reached, reached / (p + f)))


def test_no_number_of_tries_lifts_the_ceiling():
    assert laws.ceiling(MIX) == pytest.approx((2 / 3 + 1 / 4 + 0 + 4 / 5 + 0) / 5)
    rights = [laws.settled(MIX, tries)[0] for tries in range(1, 7)]
    assert rights == sorted(rights) and rights[-1] == pytest.approx(laws.ceiling(MIX))


@pytest.mark.parametrize(("cost", "price"), [(0, 0), (0, 0.1), (0.5, 0), (1, 0), (2, 0.01), (1, 0.05), (9, 0)])
def test_the_best_number_of_tries_is_that_of_an_enumeration(cost, price):
    def worth(tries: int) -> float:
        if not tries:
            return 0.0
        right, wrong, drawn = np.mean([first_accepted(*each, tries) for each in MIX], axis=0)
        return right - cost * wrong - price * drawn

    values = [worth(tries) for tries in range(7)]
    best = next(tries for tries in range(7) if values[tries] >= max(values) - 1e-10)
    assert laws.best_tries(MIX, cost, price) == best


def test_a_verifier_that_is_never_wrong_is_tried_without_end_where_that_is_free():
    assert laws.best_tries([(50, 1, 0), (50, 3, 0)], cost=100, price=0) == 50
    assert 0 < laws.best_tries([(50, 20, 2), (50, 1, 10)], cost=1, price=0) < 10  # [344]: often below ten
