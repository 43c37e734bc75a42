"""The law of ``speculate.drafter``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.speculate_drafter import (
    BRANCHES,
    check_distribution,
    check_engine,
    check_grown,
    check_loops,
    check_meanwhile,
    check_proposals,
    check_runs,
    check_shapes,
    check_superposed,
    check_twin,
)

POLICIES = enrolled("speculate.drafter")
#: What heads draft has laws of its own in the suite: see ``test_model_head.py``. And what is drafted meanwhile is what
#: would be drafted behind it, as is tested below.
MOST = [
    pytest.param(name, marks=pytest.mark.slow if name == "head" or policy.meanwhile else ())
    for name, policy in POLICIES.items()
]
BRANCHING = [name for name, policy in POLICIES.items() if policy.branches]


@pytest.mark.parametrize("name", POLICIES)
def test_the_distribution_is_the_models_exactly(name):
    check_distribution(POLICIES[name])


@pytest.mark.parametrize("name", MOST)
def test_tokens_are_those_of_an_engine_that_drafts_nothing(name):
    check_engine(POLICIES[name])
    check_loops(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_that_drafts_for_itself_is_always_right(name):
    check_twin(POLICIES[name])


@pytest.mark.parametrize("name", BRANCHING)
def test_trees_are_no_more_than_was_asked_for_and_have_the_chain(name):
    check_grown(POLICIES[name], seed=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "head" else ()) for name in BRANCHING]
)
def test_tokens_are_those_of_an_engine_that_drafts_nothing_where_trees_are_drafted(name):
    check_engine(POLICIES[name], tree=BRANCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", BRANCHING)
def test_one_way_of_the_trees_that_a_model_drafts_for_itself_is_always_right(name):
    check_twin(POLICIES[name], tree=BRANCHES)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", POLICIES)
def test_proposals_depend_on_the_text_alone_and_are_no_longer_than_asked(name, seed):
    check_proposals(POLICIES[name], seed)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.superposes])
def test_texts_that_are_drafted_in_one_row_are_those_of_the_definition(name):
    check_superposed(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_trees_with_probes_are_no_larger_and_no_taller_than_they_may_be(name):
    check_shapes(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_drafter_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])


@pytest.mark.parametrize("tree", [(), BRANCHES])
@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.meanwhile])
def test_what_is_drafted_while_something_is_verified_is_what_would_be_drafted_behind_it(name, tree):
    check_meanwhile(POLICIES[name], tree)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.tokens_of_run is not None])
def test_runs_in_a_pipeline(name):
    check_runs(POLICIES[name])
