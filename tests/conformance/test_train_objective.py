"""The law of ``train.objective``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.train_objective import check

POLICIES = enrolled("train.objective")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_objectives_holds(name: str) -> None:
    check(POLICIES[name])
