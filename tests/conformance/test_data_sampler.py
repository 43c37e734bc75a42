"""The law of ``data.sampler``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.data_sampler import check
from penstock.testing.enrolled import enrolled

POLICIES = enrolled("data.sampler")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_samplers_holds(name: str) -> None:
    check(POLICIES[name])
