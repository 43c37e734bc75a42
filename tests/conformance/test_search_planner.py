"""The law of ``search.planner``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.search_planner import check

POLICIES = enrolled("search.planner")


@pytest.mark.parametrize("name", POLICIES)
def test_the_law_of_planners_holds(name):
    check(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_planner_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
    rebuilt(POLICIES[name].limit())
