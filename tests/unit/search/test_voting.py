"""Votes that are scores: negative ones, and those of texts that could not be scored."""

from __future__ import annotations

import math

import pytest

from penstock.search.search import Search
from penstock.search.shared.allotting import rebase
from penstock.search.shared.voting import elected, weights
from penstock.testing.search_table import Letters


def voters(*votes: tuple[str, float | None]) -> list:
    """Branches that ended with an answer and a score; None where the scorer failed."""
    branches = Search({}, [1], Letters()).root.fork(len(votes))
    for branch, (answer, score) in zip(branches, votes, strict=True):
        branch.append(answer)
        branch.ended, branch.score, branch.error = "stop", score or 0.0, "no score" if score is None else None
    return branches


def winner(*votes: tuple[str, float | None]) -> str:
    branches = voters(*votes)
    found = elected(branches, weights(branches))
    assert found is not None
    return found.answer


def test_a_vote_never_counts_against_its_answer():
    """Were scores added up, one vote of -2 would beat three of -1."""
    assert winner(("a", -1.0), ("b", -2.0), ("a", -1.0), ("a", -1.0)) == "a"
    assert winner(("a", -1.0), ("b", -0.9), ("a", -1.0)) == "a"
    assert winner(("a", -9.0), ("b", -0.9), ("a", -9.0)) == "b"


def test_scores_that_are_not_negative_are_the_weights():
    assert weights(voters(("a", 0.25), ("b", 0.0), ("c", None))) == [0.25, 0.0, 0.0]
    assert weights(voters(("a", -1.0), ("b", 0.5), ("c", None))) == pytest.approx([math.exp(-1.5), 1.0, 0.0])
    assert weights([]) == []


def test_who_could_not_be_scored_has_no_vote():
    assert winner(("a", None), ("a", None), ("b", 0.0)) == "b"


def test_what_is_worth_nothing_gets_no_children():
    assert rebase([-math.inf, -3.0, -math.inf, -3.0], 8, 0.1) == [0, 4, 0, 4]
    assert sum(rebase([-math.inf, -math.inf], 8, 0.1)) == 8
