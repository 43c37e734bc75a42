"""Stop drafting when a rejection has become likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller


class Threshold(Control):
    """See :class:`SpecDecPlusPlus`."""

    def __init__(self, threshold: float, most: int) -> None:
        self._threshold, self._most = threshold, most

    def ahead(self, sequences: int) -> int:
        return self._most

    def goes_on(self, chances: Sequence[float]) -> bool:
        return 1 - math.prod(chances) <= self._threshold


@policy("speculate.controller", "specdec_pp", papers=[374])
class SpecDecPlusPlus(Controller):
    """Stops drafting for a sequence when the predicted probability that one of its drafted tokens is rejected exceeds a
    threshold (SpecDec++).

    From the paper: a head on the drafting model predicts of each drafted token how likely it is accepted if those
    before it were; the product of these is the probability that none is rejected, and to stop where 1 - product exceeds
    a threshold is the form of the best decision. For tokens whose acceptances are drawn alike, a drafted token that
    takes c, and steps that bring a token in t on average, that threshold is 1 - c / (t a), where a is the mean
    acceptance (:mod:`penstock.testing.stopping`). Ours: each sequence of a batch stops by itself, and the token that
    made it stop is verified with the others, so that whether a place is verified depends on the tokens before it alone.
    Not built: a lower bound on how many are drafted, beyond the one token.

    The head is trained for the two models: ``penstock train --preset acceptance --set target=MODEL --set draft=DRAFT``.

    Attributes:
        threshold: the probability of a rejection beyond which nothing more is drafted.
        head: the folder of the acceptance head, or of the run that trained it; None takes the one in the folder
            ``acceptance`` of the drafting model's own.
    """

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.7
    head: Annotated[str, Field(min_length=1, examples=["runs/acceptance"])] | None = None

    @property
    def predicts(self) -> bool:
        return True

    @property
    def predictions(self) -> str | None:
        return self.head

    def start(self, most: int) -> Control:
        return Threshold(self.threshold, most)
