"""Verify when the drafting model is not sure any more, by a threshold that adjusts itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller, Seen


class SelfAdjusting(Control):
    """See :class:`Fallback`.

    Attributes:
        threshold: the probability below which what was drafted is verified.
    """

    def __init__(self, policy: Fallback, most: int) -> None:
        self._policy, self._most = policy, most
        self.threshold = policy.first

    def ahead(self, sequences: int) -> int:
        return self._most

    def goes_on(self, chances: Sequence[float]) -> bool:
        return math.prod(chances) >= self.threshold

    def learn(self, seen: Seen) -> None:
        drafted = sum(seen.drafted)
        if not drafted:
            return
        rejected = (drafted - sum(seen.accepted)) / drafted
        factor = 2**rejected if rejected else 0.5
        self.threshold = min(max(self.threshold * factor, self._policy.least), self._policy.largest)


@policy("speculate.controller", "fallback", papers=[428])
class Fallback(Controller):
    """Has the drafts verified once the drafting model's confidence in them falls below a threshold, which rises with
    rejections and falls where all was right (LLMCad).

    From the paper: verification begins as soon as the small model is likely to have said something wrong, by a
    threshold that adjusts itself. From knowledge, not from the abstract: confidence is the product of the drafting
    model's own probabilities of the tokens; behind a verification that accepted everything the threshold is halved, and
    else multiplied by 2 to the power of the share that was rejected. Ours: of a tree, the confidence is that in the way
    that the drafting model would take itself; one threshold for all sequences, adjusted by what was rejected of all of
    a step; it stays between two bounds, so that it is never far from what it was; and the token that brings confidence
    below it is verified with the others, which costs a row of a pass that is made anyhow.

    Attributes:
        first: the threshold at the start.
        least, largest: its bounds.
    """

    first: Annotated[float, Field(gt=0, lt=1)] = 0.01
    least: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    largest: Annotated[float, Field(gt=0, lt=1)] = 0.9

    @model_validator(mode="after")
    def _ordered(self) -> Fallback:
        if not self.least <= self.first <= self.largest:
            raise ValueError(
                f"first ({self.first:g}) must be from least ({self.least:g}) to largest ({self.largest:g})"
            )
        return self

    @property
    def by_confidence(self) -> bool:
        return True

    def start(self, most: int) -> Control:
        return SelfAdjusting(self, most)
