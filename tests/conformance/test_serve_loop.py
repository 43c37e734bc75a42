"""The law of ``serve.loop``, for every registered policy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.serve.engine.loops.plain import Plain
from penstock.serve.messages import Finish
from penstock.testing.enrolled import enrolled
from penstock.testing.serve_loop import check_order, check_waiting, outcomes

POLICIES = enrolled("serve.loop")


@pytest.mark.parametrize("name", POLICIES)
@given(batches=st.lists(st.booleans(), max_size=12), drains=st.frozensets(st.integers(0, 24), max_size=6))
def test_every_batch_is_launched_and_published_once_in_order(name, batches, drains):
    check_order(POLICIES[name], batches, drains)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_the_plain_loop(name, seed):
    want = outcomes(Plain(), seed)
    assert outcomes(POLICIES[name], seed) == want
    assert {finish for _, finish in want.values()} == {Finish.STOP, Finish.LENGTH}


@pytest.mark.parametrize("name", POLICIES)
def test_one_that_waits_for_the_host_keeps_nobody_else_waiting(name):
    check_waiting(POLICIES[name])
