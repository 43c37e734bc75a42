"""The law of ``train.schedule``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.train_schedule import check

POLICIES = enrolled("train.schedule")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_schedules_holds(name: str) -> None:
    check(POLICIES[name])
