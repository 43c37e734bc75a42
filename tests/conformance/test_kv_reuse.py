"""The law of ``kv.reuse``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing import kv_reuse
from penstock.testing.enrolled import enrolled

POLICIES = enrolled("kv.reuse")


@pytest.mark.parametrize("name", POLICIES)
def test_scores_order_and_what_is_found(name):
    kv_reuse.check_scene(POLICIES[name])


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.plain])
def test_tokens_are_those_of_a_request_by_itself(name):
    kv_reuse.check_crowd(POLICIES[name], 5, rounds=6)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds(name):
    kv_reuse.check(POLICIES[name], crowds=10)
