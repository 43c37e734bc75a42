"""The law of ``optim.optimizer``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.optim_optimizer import check

POLICIES = enrolled("optim.optimizer")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_optimizers_holds(name: str) -> None:
    check(POLICIES[name])
