"""The law of ``pipeline.route``, for every registered policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.core.errors import UsageError
from penstock.testing.enrolled import enrolled
from penstock.testing.pipeline_route import check_route

POLICIES = enrolled("pipeline.route")


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 3), (2, 1), (3, 5), (4, 8), (8, 16)])
def test_the_law_of_routes_holds(name, devices, microbatches):
    check_route(POLICIES[name], devices, microbatches)


@pytest.mark.parametrize("name", POLICIES)
@given(devices=st.integers(1, 9), microbatches=st.integers(1, 24))
def test_the_law_holds_for_any_numbers(name, devices, microbatches):
    check_route(POLICIES[name], devices, microbatches)


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_built_of_nothing(name):
    with pytest.raises(UsageError, match="does nothing"):
        POLICIES[name].build(0, 4)
