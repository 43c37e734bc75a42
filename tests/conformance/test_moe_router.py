"""The law of ``moe.router``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.moe_router import check, check_compiles

POLICIES = enrolled("moe.router")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_routers_holds(name: str) -> None:
    check(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_the_block_compiles_whole(name: str) -> None:
    check_compiles(POLICIES[name])
