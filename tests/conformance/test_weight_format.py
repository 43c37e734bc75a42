"""The law of ``weight.format``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.weight_format import check

POLICIES = enrolled("weight.format")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_weight_formats_holds(name: str) -> None:
    check(POLICIES[name])
