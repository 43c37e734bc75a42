"""The law of ``plan.batch``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.plan_batch import check

POLICIES = enrolled("plan.batch")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_batch_advisors_holds(name: str) -> None:
    check(POLICIES[name])
