"""The law of ``search.scorer``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.search_scorer import check_example, check_hidden, check_hostile, check_killer

POLICIES = enrolled("search.scorer")


@pytest.mark.parametrize("name", POLICIES)
def test_the_examples_scores(name):
    check_example(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_bad_texts_fail_alone(name):
    check_hostile(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_texts_that_are_run_see_their_own_processes_alone(name):
    check_hidden(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_texts_that_end_what_judges_them_fail_alone(name):
    check_killer(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_scorer_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
