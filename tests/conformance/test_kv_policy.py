"""The law of ``kv.policy``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing import kv_policy
from penstock.testing.enrolled import enrolled

POLICIES = enrolled("kv.policy")


@pytest.mark.parametrize("name", POLICIES)
def test_sizes_rows_and_memory(name):
    kv_policy.check_sizes(POLICIES[name])
    kv_policy.check_rows(POLICIES[name])
    kv_policy.check_shared(POLICIES[name])
    kv_policy.check_strong(POLICIES[name])
    kv_policy.check_layers(POLICIES[name])
    kv_policy.check_selected(POLICIES[name])
    kv_policy.check_copied(POLICIES[name])
    kv_policy.check_limit(POLICIES[name])
    kv_policy.check_together(POLICIES[name])
    kv_policy.check_held(POLICIES[name])
    kv_policy.check_continued(POLICIES[name])
    kv_policy.check_whole(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_a_sequence_by_itself(name):
    kv_policy.check_engine(POLICIES[name], crowds=1, examples=1, steps=10)


@pytest.mark.parametrize("name", POLICIES)
def test_under_pressure_caches_are_compressed_before_anybody_is_preempted(name):
    kv_policy.check_pressure(POLICIES[name], crowds=2, examples=0, steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_law_holds(name):
    kv_policy.check(POLICIES[name], crowds=8, examples=20)
