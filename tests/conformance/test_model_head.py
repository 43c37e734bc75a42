"""The law of ``model.head``, for every registered policy."""

from __future__ import annotations

import pytest

from penstock.testing.enrolled import enrolled, rebuilt
from penstock.testing.model_head import check_drafts, check_folder, check_learning, check_sight, check_tokens

POLICIES = enrolled("model.head")


@pytest.fixture(params=sorted(POLICIES))
def kind(request):
    return POLICIES[request.param]


def test_guesses_see_what_they_say_and_no_more(kind):
    check_sight(kind)


def test_only_the_head_learns(kind):
    check_learning(kind)


def test_a_folder_holds_every_bit_and_is_for_one_model(kind):
    check_folder(kind)


def test_what_an_engine_drafts_are_the_heads_guesses(kind):
    check_drafts(kind)


def test_tokens_are_those_of_an_engine_that_drafts_nothing(kind):
    check_tokens(kind)


def test_a_head_can_be_made_from_its_description(kind):
    rebuilt(kind)
