"""What it takes to compute a token of a prompt, as steps show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from penstock.core.pace import Pace
from penstock.serve.engine.batch import Batch

#: Tokens of one sequence from which on a step shows what tokens of prompts take: with fewer, most of its time is not
#: theirs. And about so many tokens show it.
PIECE, LATELY = 256, 2**15


class PromptClock:
    """Times steps with long pieces of prompts. A step's turn comes when the one before it is over, and nobody waits for
    one of which nothing is told: what it took is seen when something is told of a later one.

    Attributes:
        clock: says how many seconds have passed.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self._pace, self._ended = Pace(LATELY), -math.inf
        #: Of the steps since the last of which something was told: when the first began, their tokens, and whether any
        #: has a long piece.
        self._begun, self._tokens, self._long = math.inf, 0, False

    @property
    def seconds(self) -> float:
        """For a token; infinite where nothing is known."""
        return self._pace.each if self._pace.known else math.inf

    def begin(self, batch: Batch) -> None:
        """``batch`` is launched."""
        batch.launched = self.clock()

    def end(self, batch: Batch, told: bool) -> None:
        """``batch`` is over, if its tokens are ``told``, or will be before that of the next is."""
        self._begun = min(self._begun, batch.launched)
        tokens = batch.tokens
        self._tokens += tokens
        self._long = self._long or (tokens >= PIECE and any(entry.count >= PIECE for entry in batch.entries))
        if told:
            now = self.clock()
            if self._long:
                self._pace.add(now - max(self._begun, self._ended), self._tokens)
            self._ended, self._begun, self._tokens, self._long = now, math.inf, 0, False
