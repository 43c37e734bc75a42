"""The length, or none, that brings the most tokens a second as measured."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from statistics import median
from typing import Annotated

import numpy as np
from pydantic import Field

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller, Seen

#: The last so many times that a step of a kind was timed count.
TIMES = 9

#: Trials that go well are repeated so often in a row at most, and those that change nothing become so many times as
#: rare in the end.
REPEATED, RARER = 8, 8

#: Where drafts win, what a step takes without them is timed anew after so many times as many steps as there are
#: between trials where they lose.
RENEWED = 4


class Measuring(Control):
    """See :class:`Measured`."""

    def __init__(self, policy: Measured, most: int) -> None:
        self._policy = policy
        self._lengths = [0, *sorted({1, 2, 3, most // 2, most} & set(range(1, most + 1)))]
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=TIMES))
        #: How often so many tokens were to be drafted, and were accepted, old trials fading.
        self._tried, self._accepted = [0.0] * most, [0.0] * most
        #: Steps in which nothing was drafted, how many there are between trials by now, and trials in a row.
        self._since, self._wait, self._trials = 0, policy.patience, 0
        self._going = 0  # steps with drafts, since what one takes without was timed
        self._by_rows: dict[int, deque[float]] = {}  # seconds of steps with prompts and without

    def ahead(self, sequences: int) -> int:
        crowd, most, rates = sequences.bit_length(), self.tokens(self._lengths[-1]), dict[int, float]()
        for length in self._lengths:
            times = self._seconds[crowd, length]
            if len(times) < self._policy.trials:
                return length
            seconds = median(times)
            rates[length] = self.tokens(length) / seconds
            if most / seconds < rates[0]:
                break  # longer ones take longer, and lose whatever they bring
        best = max(rates, key=lambda length: rates[length])
        if best:
            self._since, self._wait, self._trials = 0, self._policy.patience, 0
            self._going += 1
            if self._going > RENEWED * self._policy.patience:
                self._going = 0
                self._seconds[crowd, 0].clear()
            return best
        self._going = 0
        self._since += 1
        if self._since < self._wait:
            return 0
        if self._trials == 0:
            self._wait = min(2 * self._wait, RARER * self._policy.patience)
        self._since, self._trials = 1, self._trials + 1
        return max(list(rates)[1:], key=lambda length: rates[length])

    def tokens(self, length: int) -> float:
        """Tokens a step of a sequence for which ``length`` are drafted, by what was accepted lately."""
        reached, expected, rate = 1.0, 1.0, 0.5
        for tried, accepted in zip(self._tried[:length], self._accepted[:length], strict=True):
            # Where a depth was hardly tried, it is as the one before it, and rather better than worse: to try it is how
            # to know.
            deeper = (accepted + rate * reached) / (tried + 1)
            deeper = min(reached, deeper + self._policy.hope * math.sqrt(deeper * (1 - deeper) / (tried + 1)))
            rate, reached = deeper / max(reached, 1e-9), deeper
            expected += reached
        return expected

    def seconds(self, rows: np.ndarray) -> np.ndarray:
        # Between sizes that were timed it is a straight line, and beyond them the last of these goes on; no step takes
        # less than a smaller one.
        known = sorted(self._by_rows)
        if len(known) < 2:
            return super().seconds(rows)
        sizes = 2.0 ** (np.array(known) / 2)
        times = np.maximum.accumulate([median(self._by_rows[each]) for each in known])
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        seconds: np.ndarray = np.interp(rows, sizes, times) + slope * np.maximum(0, rows - sizes[-1])
        return seconds

    def learn(self, seen: Seen) -> None:
        if seen.rows and seen.seconds is not None:
            self._by_rows.setdefault(round(2 * math.log2(seen.rows)), deque(maxlen=TIMES)).append(seen.seconds)
        if seen.probes and not any(seen.drafted):
            # What was probed is drafted in the next step: until then nothing was tried.
            self._since = self._wait if self._since else 0
            return
        if seen.ahead:
            # Depths that were not tried are forgotten too: they may have become better.
            self._tried = [self._policy.memory * each for each in self._tried]
            self._accepted = [self._policy.memory * each for each in self._accepted]
        for depth in range(seen.ahead):
            self._tried[depth] += len(seen.accepted)
            self._accepted[depth] += sum(accepted > depth for accepted in seen.accepted)
        if self._since and seen.ahead:
            if sum(seen.accepted) > sum(seen.drafted) / 2 and self._trials < REPEATED:
                self._since = self._wait  # a trial that went well is repeated at once
            else:
                self._trials = 0
        if not seen.prompts and seen.sequences and seen.seconds is not None:
            self._seconds[seen.sequences.bit_length(), seen.ahead].append(seen.seconds)


@policy("speculate.controller", "measured")
class Measured(Controller):
    """Takes the number of drafted tokens that brings the most tokens a second by what was measured here: none where
    speculation loses.

    What a step takes is timed for a few lengths, the shorter ones first, by how many sequences go on (to a factor of
    two), and for none once more from time to time; what it brings is reckoned from how often tokens at each depth were
    accepted lately. Where none are drafted, some are now and then, and more rarely the longer that changes nothing, to
    see whether they are accepted by now.

    Attributes:
        trials: how often each length is timed before one is chosen.
        patience: steps without drafts after which some are drafted at first.
        hope: how many standard errors are added to what is known of a depth.
        memory: by what the weight of what was accepted is multiplied in each step that drafts.
    """

    trials: Annotated[int, Field(ge=1, le=9)] = 3
    patience: Annotated[int, Field(ge=2, le=100_000)] = 96
    hope: Annotated[float, Field(ge=0, le=4)] = 0.5
    memory: Annotated[float, Field(gt=0, le=1)] = 0.98

    def start(self, most: int) -> Control:
        return Measuring(self, most)
