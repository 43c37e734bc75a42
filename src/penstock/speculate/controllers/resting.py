"""A controller that is left alone where it rests."""

from __future__ import annotations

from penstock.speculate.controllers.contract import Control


class Resting:
    """Asks ``control`` how much is drafted, but for those steps in which it would draft nothing anyhow: where steps are
    short, to ask it and to tell it is felt, and most steps are such where drafting loses.

    Attributes:
        asleep: whether it was not asked about the last step; it is not to be told of that one either.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self.asleep = False
        self._sequences, self._left, self._slept = 0, 0, 0

    def ahead(self, sequences: int) -> int:
        """How many tokens may be drafted for each of ``sequences`` in the next step."""
        if self._left and sequences == self._sequences:
            self._left -= 1
            self._slept += 1
            self.asleep = True
            return 0
        self.asleep = False
        if self._slept:
            self._control.rested(self._slept)
        ahead = self._control.ahead(sequences)
        self._sequences, self._slept = sequences, 0
        self._left = 0 if ahead else self._control.rests()
        return ahead
