"""The law of ``train.tuner``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.train_objective import EXPERTS, SHAPE
from penstock.testing.train_tuner import check

POLICIES = enrolled("train.tuner")


@pytest.mark.parametrize("shape", [SHAPE, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_tuners_holds(name: str, shape) -> None:
    check(POLICIES[name], shape)
