"""The law of ``model.family``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.model_family import check

POLICIES = enrolled("model.family")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_families_holds(name: str) -> None:
    check(POLICIES[name])
