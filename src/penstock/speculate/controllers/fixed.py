"""Always the same."""

from __future__ import annotations

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller


class Always(Control):
    """See :class:`Fixed`."""

    def __init__(self, length: int) -> None:
        self._length = length

    def ahead(self, sequences: int) -> int:
        return self._length


@policy("speculate.controller", "fixed")
class Fixed(Controller):
    """Drafts as many tokens in every step, as many as the drafter can if not told otherwise.

    Attributes:
        length: how many.
    """

    length: PositiveInt | None = None

    def start(self, most: int) -> Control:
        return Always(min(self.length or most, most))
