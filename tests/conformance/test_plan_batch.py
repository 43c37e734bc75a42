"""The law of ``plan.batch``, for every registered policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.plan.decoding import DecodeCost
from penstock.plan.hardware import Hardware
from penstock.testing.enrolled import enrolled
from penstock.testing.plan_batch import check_advisor

POLICIES = enrolled("plan.batch")

costs = st.builds(
    DecodeCost,
    st.builds(Hardware, flops=st.floats(10, 1000), bandwidth=st.floats(1, 100), memory=st.floats(10, 1000)),
    weights=st.floats(1, 200),
    cache=st.floats(1, 20),
    flops=st.floats(1, 100),
)


@pytest.mark.parametrize("name", POLICIES)
@given(cost=costs, slowest=st.none() | st.floats(0.01, 100))
def test_the_law_of_batch_advisors_holds(name, cost, slowest):
    check_advisor(POLICIES[name], cost, slowest)
