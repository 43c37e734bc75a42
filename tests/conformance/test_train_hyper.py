"""The law of ``train.hyper``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.train_hyper import check

POLICIES = enrolled("train.hyper")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_hyper_rules_holds(name: str) -> None:
    check(POLICIES[name])
