"""The law of ``serve.routing``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled
from penstock.testing.serve_routing import check

POLICIES = enrolled("serve.routing")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_routing_holds(name: str) -> None:
    check(POLICIES[name])
