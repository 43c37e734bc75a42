"""Votes over answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.search.branch import Branch


def tally(answers: Iterable[str], weights: Iterable[float]) -> dict[str, float]:
    """The weight of each answer, in the order in which they first came; an empty answer is none."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            votes[answer] = votes.get(answer, 0.0) + weight
    return votes


def elected(branches: Sequence[Branch], weights: Sequence[float] | None = None) -> Branch | None:
    """Of those that ended, a branch with the answer that has the most weight, a vote each by default; among those that
    give it the one with the largest weight; of equals, the first. None where none has an answer."""
    shares = [1.0] * len(branches) if weights is None else weights
    voters = [(each, weight) for each, weight in zip(branches, shares, strict=True) if each.finished and each.answer]
    votes = tally((each.answer for each, _ in voters), (weight for _, weight in voters))
    if not votes:
        return None
    winner = max(votes, key=lambda answer: votes[answer])
    return max((pair for pair in voters if pair[0].answer == winner), key=lambda pair: pair[1])[0]
