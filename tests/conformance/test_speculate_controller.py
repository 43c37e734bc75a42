"""The law of ``speculate.controller``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.speculate_controller import (
    check_bounds,
    check_confidence,
    check_crowds,
    check_ends,
    check_engine,
    check_losses,
    check_predictions,
    check_rests,
    check_times,
)
from penstock.testing.speculate_drafter import BRANCHES

POLICIES = enrolled("speculate.controller")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", POLICIES)
def test_lengths_stay_within_what_there_is_and_follow_from_what_was_seen(name, seed):
    check_bounds(POLICIES[name], seed)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.predicts])
def test_drafting_ends_where_the_predictions_of_the_whole_text_say(name):
    check_ends(POLICIES[name])
    check_predictions(POLICIES[name])


@pytest.mark.parametrize("tree", [(), BRANCHES])
@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.by_confidence])
def test_drafting_ends_where_the_model_is_not_sure_of_the_whole_text(name, tree):
    check_ends(POLICIES[name])
    check_confidence(POLICIES[name], tree=tree)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_an_engine_that_drafts_nothing(name):
    check_engine(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_step_is_said_to_take_is_what_one_more_costs(name):
    check_times(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_all_who_come_together_are_asked_about(name):
    check_crowds(POLICIES[name])


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.goes_by_time])
def test_where_drafting_loses_next_to_nothing_is_lost(name):
    check_losses(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_left_alone_where_it_rests_it_decides_as_if_it_were_told(name):
    check_rests(POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_a_controller_can_be_made_from_its_description(name):
    rebuilt(POLICIES[name])
