"""The law of ``attention.paged``, for every registered policy that serves the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import PenstockError
from penstock.ops.paged.contract import PagedAttention
from penstock.testing import check
from penstock.testing.attention_paged import (
    TOLERANCES,
    Place,
    check_course,
    check_large_scores,
    check_long_courses,
    check_nan,
    check_needs,
    check_sizes,
    courses,
    places,
)
from penstock.testing.enrolled import enrolled

POLICIES = enrolled("attention.paged")


def on_cpu(name: str) -> tuple[PagedAttention, list[Place]]:
    """The policy, and where it works on CPUs."""
    policy = POLICIES[name]
    assert isinstance(policy, PagedAttention)
    found = [place for place in places(policy) if place.device.type == "cpu"]
    if not found:
        pytest.skip(f"{name}: {policy.serves(torch.device('cpu'), torch.float32, 64)}")
    return policy, found


@pytest.mark.parametrize("name", POLICIES)
def test_long_sequences_large_scores_and_nan(name):
    """Long ones in one type of numbers; :func:`test_the_law_holds` has all."""
    policy, found = on_cpu(name)
    check_long_courses(policy, next(place for place in found if place.dtype == torch.float32))
    for place in found:
        check_large_scores(policy, place)
        check_nan(policy, place)
        check_sizes(policy, place)


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_policy_knows_besides(name):
    """In one type of numbers, as before."""
    policy, found = on_cpu(name)
    check_needs(policy, next(place for place in found if place.dtype == torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds(name):
    policy, _ = on_cpu(name)
    check(policy)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=10)
@given(data=st.data())
def test_every_token_sees_its_own_sequence(name, dtype, data):
    policy, found = on_cpu(name)
    place = next((place for place in found if place.dtype == dtype), None)
    if place is None:
        pytest.skip(f"{name} does not serve {dtype}")
    check_course(policy, place, data.draw(courses(place.head_dims)))


def test_a_policy_that_serves_nothing_here_says_why():
    class Elsewhere(PagedAttention):
        policy_name, contract_name = "elsewhere", "attention.paged"

        def serves(self, device, dtype, head_dim):
            return "it needs a telephone exchange"

    with pytest.raises(PenstockError, match=r"'elsewhere' serves no device of this machine: it needs a telephone"):
        check(Elsewhere())
