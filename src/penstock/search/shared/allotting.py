"""Sharing out a width among branches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.search.branch import Branch
from penstock.search.shared.resampling import normalised


def top(branches: Iterable[Branch], count: int) -> list[Branch]:
    """The ``count`` branches that are worth most, in their order; of equals, the earlier."""
    found = list(branches)
    chosen = sorted(found, key=lambda each: -each.worth)[:count]
    return [each for each in found if each in chosen]


def rebase(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """How many children each of the ``scores`` gets, ``width`` in all: in proportion to exp(score / temperature),
    rounded up from the best on while some are left (REBASE, Wu et al. 2024: reward-balanced search). What is worth
    -inf gets none where another is worth more."""
    shares = normalised([each / temperature for each in scores])
    counts, left = [0] * len(scores), width
    rest = sum(shares)
    for place in sorted(range(len(scores)), key=lambda each: -shares[each]):
        if left == 0 or rest <= 0 or shares[place] == 0:
            break
        counts[place] = min(left, max(1, round(left * shares[place] / rest)))
        left -= counts[place]
        rest -= shares[place]
    if left:
        counts[max(range(len(scores)), key=lambda each: shares[each])] += left
    return counts


def prune(branches: Iterable[Branch], kept: Iterable[Branch]) -> None:
    """Drops those of ``branches`` that are not ``kept``."""
    staying = set(kept)
    for branch in branches:
        if branch not in staying:
            branch.drop()
