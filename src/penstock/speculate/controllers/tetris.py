"""A budget of verified tokens, for the likeliest drafts of the batch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller


class Likeliest(Control):
    """See :class:`Tetris`."""

    def __init__(self, policy: Tetris, most: int) -> None:
        self._length = min(policy.length, most)
        self._ahead = min(self._length + policy.extra, most)

    def ahead(self, sequences: int) -> int:
        return self._ahead

    def kept(self, confidence: Sequence[Sequence[float]]) -> list[int]:
        return likeliest(confidence, self._length * len(confidence))


@policy("speculate.controller", "tetris", papers=[191])
class Tetris(Controller):
    """Drafts more than it verifies, and gives the batch's budget of verified tokens to the likeliest drafts.

    From the paper: the budget for the whole batch, and a greedy choice that is optimal. From knowledge: a draft is
    worth the product of the confidences up to it. Ours: the confidence in a place is the probability of the likeliest
    token there, not of the one that was drafted: else tokens would be verified because of which they are, and sampled
    output would not have the target's distribution.

    Attributes:
        length: tokens that are verified, for each sequence in the mean.
        extra: tokens that are drafted beyond.
    """

    length: Annotated[int, Field(ge=1, le=64)] = 3
    extra: Annotated[int, Field(ge=0, le=64)] = 2

    @property
    def weighs(self) -> bool:
        return True

    def start(self, most: int) -> Control:
        return Likeliest(self, most)


def likeliest(confidence: Sequence[Sequence[float]], budget: int) -> list[int]:
    """How many of the first tokens of each sequence are verified, ``budget`` in all at most, such that the sum of the
    products of confidences is the largest there is. A product never grows along a sequence, so the greedy choice is."""
    kept = [0] * len(confidence)
    heap = [(-each[0], place) for place, each in enumerate(confidence) if each]
    heapq.heapify(heap)
    for _ in range(budget):
        if not heap:
            break
        worth, place = heapq.heappop(heap)
        kept[place] += 1
        if kept[place] < len(confidence[place]):
            heapq.heappush(heap, (worth * confidence[place][kept[place]], place))
    return kept
