"""How long things take that are done again and again, by what they took lately."""

from __future__ import annotations

import math


class Pace:
    """Seconds for each of many things, where what was measured last counts most.

    Args:
        memory: after so many more of them, what was measured counts a third of what it did.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._seconds = self._count = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._count > 0

    @property
    def each(self) -> float:
        """Seconds for one; 0 where nothing was measured."""
        return self._seconds / self._count if self.known else 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """``count`` of them took so many ``seconds`` together."""
        left = math.exp(-count / self._memory)
        self._seconds, self._count = left * self._seconds + seconds, left * self._count + count

    def doubt(self, share: float) -> None:
        """What was measured may be out of date: one is taken to need that ``share`` of it."""
        self._seconds *= share
