"""How long things take, beside the sums that the rule stands for."""

from __future__ import annotations

import math

import pytest

from penstock.core.pace import Pace


def test_it_is_the_mean_in_which_what_came_before_fades():
    pace, measured = Pace(10), [(3.0, 2), (1.0, 5), (8.0, 1), (0.5, 30)]
    assert not pace.known and pace.each == 0
    for seconds, count in measured:
        pace.add(seconds, count)
    after = [sum(count for _, count in measured[place + 1 :]) for place in range(4)]
    weights = [math.exp(-each / 10) for each in after]
    shares = [sum(w * each[part] for w, each in zip(weights, measured, strict=True)) for part in (0, 1)]
    assert pace.known and pace.each == pytest.approx(shares[0] / shares[1])
    pace.doubt(0.5)
    assert pace.each == pytest.approx(shares[0] / shares[1] / 2)


def test_what_has_changed_is_believed_before_long():
    pace = Pace(100)
    for seconds in [1.0] * 1000 + [0.01] * 300:
        pace.add(seconds)
    assert pace.each < 0.01 + math.exp(-3)
