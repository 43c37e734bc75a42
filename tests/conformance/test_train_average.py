"""The law of ``train.average``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.train_average import check

POLICIES = enrolled("train.average")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_averages_holds(name: str) -> None:
    check(POLICIES[name])
