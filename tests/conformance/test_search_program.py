"""The law of ``search.program``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.search_program import check_alone, check_budget, check_failures, check_limit, check_recount

POLICIES = enrolled("search.program")


@pytest.mark.parametrize("name", POLICIES)
def test_one_sample_is_plain_sampling(name):
    check_limit(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_no_budget_is_exceeded(name):
    check_budget(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_the_ledger_equals_a_recount(name):
    check_recount(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_the_tree_is_the_same_beside_others(name):
    check_alone(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_scorers_may_fail(name):
    check_failures(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_program_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
