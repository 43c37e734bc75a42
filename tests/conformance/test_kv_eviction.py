"""The law of ``kv.eviction``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.kv_eviction import check

POLICIES = enrolled("kv.eviction")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_evictions_holds(name: str) -> None:
    check(POLICIES[name])
