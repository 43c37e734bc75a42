"""Votes over answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from penstock.search.branch import Branch


def weights(branches: Sequence[Branch]) -> list[float]:
    """What the votes of scored ``branches`` weigh: their scores, and 0 where the scorer failed. Where a score is
    negative, as rewards are that only tell more from less, all weigh exp(score - the highest score) (ours): two votes
    then never weigh less than one of them."""
    worths = [each.worth for each in branches]
    highest = max(worths, default=0.0)
    if any(-math.inf < each < 0 for each in worths):
        return [math.exp(each - highest) for each in worths]
    return [max(0.0, each) for each in worths]


def tally(answers: Iterable[str], weights: Iterable[float]) -> dict[str, float]:
    """The weight of each answer, in the order in which they first came; an empty answer is none."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            votes[answer] = votes.get(answer, 0.0) + weight
    return votes


def elected(branches: Sequence[Branch], weights: Sequence[float] | None = None) -> Branch | None:
    """Of those that ended, a branch with the answer that has the most weight, a vote each by default; among those that
    give it the one with the largest weight; of equals, the first. Those on which a scorer failed have no vote where
    there is another. None where none that may vote has an answer."""
    shares = [1.0] * len(branches) if weights is None else weights
    ended = [(each, weight) for each, weight in zip(branches, shares, strict=True) if each.finished]
    voters = [pair for pair in ended if pair[0].error is None] or ended
    voters = [pair for pair in voters if pair[0].answer]
    votes = tally((each.answer for each, _ in voters), (weight for _, weight in voters))
    if not votes:
        return None
    winner = max(votes, key=lambda answer: votes[answer])
    return max((pair for pair in voters if pair[0].answer == winner), key=lambda pair: pair[1])[0]
