"""The length, or none, that brings the most tokens a second as measured."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Annotated

import numpy as np
from pydantic import Field

from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller, Seen
from penstock.speculate.expected import chain_tokens

#: The last so many times that a step of a kind was timed count: about as many as what was accepted is known by.
TIMES = 32

#: By how much drafting has to win by what was measured, to go on and to begin. Some of what it costs is in no step that
#: is timed: a model that drafts has to compute prompts, too. And the best of several lengths, each timed a few times,
#: seems better than it is.
MARGIN, BEGINNING = 1.03, 1.06

#: Trials that may lose before anything else is known, in steps without drafts.
CREDIT = 3

#: What drafting has won is remembered up to so many steps without drafts. Trials may lose that, too, and come as many
#: times sooner: of a text that is easy and hard in turns, much of what is easy would be over before the next one.
WINNINGS, SOONER = 32, 8

#: Where drafting loses, it is reckoned anew once in so many steps, since what that takes is felt where steps are short.
REST = 8

#: Where not even drafts that are all accepted would win, or trials have lost what they may, one is left of so many.
SELDOM = 32

#: What is known of acceptances counts so much where nothing was drafted for a while: texts have gone on.
LONG_AGO = 0.5

#: By how much a step may have been expected to take longer than it does.
UNSURE = 2

#: By how much the first step of a trial loses more than that of the one before, at most: what happens at a first use,
#: such as that a kernel is loaded, takes long, and once.
DEARER = 3

#: How many tokens are accepted where drafting is worth trying.
MUCH = 0.7

#: By how much a step may take longer than its rows would, one after the other, in plain steps.
DISTURBED = 2

#: From so many drafts at least something is learned of a length that has lost.
REPEATED = 8


class Measuring(Control):
    """See :class:`Measured`."""

    def __init__(self, policy: Measured, most: int) -> None:
        self._policy = policy
        self._lengths = [0, *sorted({1, 2, 3, most // 2, most} & set(range(1, most + 1)))]
        self._seconds: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=TIMES))
        #: Of which crowds and lengths it is known so far what they were expected to take alone.
        self._told = set[tuple[int, int]]()
        #: How often so many tokens were to be drafted, and were accepted, old trials fading.
        self._tried, self._accepted = [0.0] * most, [0.0] * most
        self._since = 1  # steps in a row in which nothing was drafted, and what was before the first
        self._trials = 0  # and trials in a row, of which the last one asks for another
        self._behind = 0.0  # and seconds that those behind the first of them have lost
        self._again = False
        #: Whether drafting pays, steps since then, and of which crowd and length it is to be confirmed.
        self._drafting, self._winning = False, 0
        self._confirming: tuple[int, int] | None = None
        #: Seconds of all steps that were timed, and those that drafting has won beside plain decoding; below 0, those
        #: that trials have lost.
        self._spent, self._balance = 0.0, 0.0
        self._crowd = 0  # for which it has won
        self._dear = 0.0  # and what the first of the last ones counts for, in which a model computes what it missed
        self._before: float | None = None  # the same, whatever it was; None before there was one
        self._by_rows: dict[int, deque[float]] = {}  # seconds of steps with prompts and without
        self._resting: int | None = None  # of which crowd it is known that drafting loses
        self._plain = 0.0  # and what its steps without drafts take
        self._brings: list[float] = []  # tokens of a step by length, where they were reckoned since the last drafts

    def ahead(self, sequences: int) -> int:
        crowd = _crowd(sequences)
        if crowd != self._crowd:
            self._crowd, self._balance = crowd, min(0.0, self._balance)
        if crowd == self._resting and self._since % REST:
            return 0
        self._resting = None
        return self._decide(crowd)

    def rests(self) -> int:
        return 0 if self._resting is None else REST - 1 - self._since % REST

    def rested(self, steps: int) -> None:
        # Most steps where drafting loses: then it should cost nothing.
        self._since += steps
        self._spent += steps * self._plain

    def _decide(self, crowd: int) -> int:
        """The length for a ``crowd``."""
        if not self._known(crowd, 0):
            return 0
        plain, most = 1 / _usual(self._seconds[crowd, 0]), self.tokens(self._lengths[-1])
        rates, loss = {0: plain}, 0.0
        for length in self._lengths[1:]:
            times = self._seconds[crowd, length]
            hopeless = len(times) > 1 and self._hopeless(crowd, min(times))
            if not (hopeless or self._known(crowd, length)):
                loss = min(times) - self.tokens(length) / plain if times else loss
                if self._again or self._affords(plain, loss) or (times and self._repays(loss)):
                    return length
                break
            seconds, tokens = _usual(times), self.tokens(length)
            rates[length], loss = tokens / seconds, min(times) - tokens / plain
            if hopeless or most / seconds < plain:
                break  # longer ones take longer, and lose whatever they bring
        best = max(rates, key=lambda length: rates[length])
        if rates[best] > (MARGIN if self._drafting else BEGINNING) * plain:
            if self._confirmed(crowd, best):
                return self._renewed(crowd, best, list(rates))
            return self._decide(crowd)
        self._winning, self._drafting, self._confirming = 0, False, None
        length = self._tried_next(crowd, plain)
        if not length:
            self._resting, self._plain = crowd, 1 / plain
        return length

    def _tried_next(self, crowd: int, plain: float) -> int:
        """Where drafting loses by what was accepted lately: the length that brings the most if much is accepted, where
        it is time to see, or worth going on; else 0. Where it would lose if all were accepted, it is seldom looked at
        whether this is still so."""
        seconds = {length: _usual(times) for length in self._lengths[1:] if (times := self._seconds[crowd, length])}
        patience = self._policy.patience // (SOONER if self._balance > 1 / plain else 1)
        if not seconds or not (self._again or self._since >= patience):
            return 0
        length = max(seconds, key=lambda each: chain_tokens(MUCH, each) / seconds[each])
        # What was expected may be too much by far.
        doubt = UNSURE if (crowd, length) in self._told else 1
        hopeless = self._known(crowd, length) and doubt * (1 + length) / seconds[length] < plain
        rare = self._since >= SELDOM * self._policy.patience
        loss = seconds[length] - self.tokens(length) / plain
        wanted = rare or (not hopeless and (self._again or self._affords(plain, loss)))
        return length if wanted else 0

    def _known(self, crowd: int, length: int) -> bool:
        return len(self._seconds[crowd, length]) >= self._policy.trials

    def _affords(self, plain: float, loss: float) -> bool:
        """Whether a trial may lose so many seconds more, where ``plain`` decoding makes so many steps in a second."""
        whole = max(0.0, loss) + max(0.0, self._dear)
        return whole <= self._policy.share * self._spent + CREDIT / plain + self._balance

    def _repays(self, loss: float) -> bool:
        """Whether drafting is to be confirmed though trials have lost what they may, as they do for a larger crowd: it
        is time to see, and a step seems to win (a ``loss`` below 0) so much that what its beginning costs is made good
        before the next time."""
        return self._since >= self._policy.patience and max(0.0, self._dear) < -loss * self._policy.patience

    def _confirmed(self, crowd: int, best: int) -> bool:
        """Whether drafting goes on, or the ``best`` length was timed since it seems to win. If not, it has to be: what
        was timed long ago says little beside plain decoding of today, on a machine that is not always as fast."""
        self._drafting = self._drafting or self._confirming == (crowd, best)
        if not self._drafting:
            self._confirming = crowd, best
            self._forget(crowd, best)
        return self._drafting

    def _forget(self, crowd: int, length: int) -> None:
        """Forgets what such steps took, but for one: beside it, a single new one decides nothing."""
        self._seconds[crowd, length] = deque([_usual(self._seconds[crowd, length])], TIMES)

    def _renewed(self, crowd: int, best: int, known: list[int]) -> int:
        """The ``best`` length, or another one of the ``known`` where it is time to see what that takes by now: each has
        its turn."""
        turn, early = divmod(self._winning, self._policy.patience)
        if early or not turn:
            return best
        others = [length for length in known if length != best]
        length = others[turn % len(others)]
        self._forget(crowd, length)
        return length

    def tokens(self, length: int) -> float:
        """Tokens a step of a sequence for which ``length`` are drafted, by what was accepted lately."""
        self._brings = self._brings or [*itertools.accumulate(self._reached(), initial=1.0)]
        return self._brings[length]

    def _reached(self) -> Iterator[float]:
        """How likely the token at each depth is accepted."""
        reached, rate = 1.0, 0.5
        for tried, accepted in zip(self._tried, self._accepted, strict=True):
            # Where a depth was hardly tried, it is as the one before it, and rather better than worse: to try it is how
            # to know.
            deeper = (accepted + rate * reached) / (tried + 1)
            deeper = min(reached, deeper + self._policy.hope * math.sqrt(deeper * (1 - deeper) / (tried + 1)))
            rate, reached = deeper / max(reached, 1e-9), deeper
            yield reached

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

    def asks(self) -> Sequence[int]:
        return self._lengths

    def expect(self, sequences: int, ahead: int, seconds: float) -> None:
        self._assume(_crowd(sequences), ahead, seconds)

    def _assume(self, crowd: int, length: int, seconds: float) -> None:
        """Such a step is expected to take so many seconds."""
        self._seconds[crowd, length] = deque(self._policy.trials * [seconds], TIMES)
        self._told.add((crowd, length))

    def learn(self, seen: Seen) -> None:
        if not seen.ahead and self._resting is not None and self._since % REST:
            self.rested(1)
            return
        if seen.rows and seen.seconds is not None:
            self._by_rows.setdefault(round(2 * math.log2(seen.rows)), deque(maxlen=TIMES)).append(seen.seconds)
        self._spent += seen.seconds or 0.0
        if seen.probes and not any(seen.drafted):
            # What was probed is drafted in the next step: until then nothing was tried.
            self._again = seen.ahead > 0
            return
        self._winning += 1
        first, long_ago = self._since > 0, self._since >= self._policy.patience
        self._since = 0 if seen.ahead else self._since + 1
        if seen.ahead:
            self._count(seen, LONG_AGO if long_ago else self._policy.memory)
        if seen.prompts or not seen.sequences or seen.seconds is None:
            self._again = False
            return
        crowd, seconds, first = _crowd(seen.sequences), seen.seconds, first and seen.ahead > 0
        if seen.ahead and self._seconds[crowd, 0]:
            plain = _usual(self._seconds[crowd, 0])
            # That the machine was disturbed is not the drafts' fault.
            rows = max(1 + seen.ahead, seen.rows / seen.sequences)
            seconds = seen.drafting + min(seconds - seen.drafting, DISTURBED * rows * plain)
            self._weigh(seen, crowd, seconds, plain, first)
        if not first:
            self._time(crowd, seen.ahead, seconds)
        elif self._hopeless(crowd, seconds - seen.drafting):
            # A model that drafts for the first time in a while computes what it has missed: the rest may be enough.
            self._time(crowd, seen.ahead, seconds - seen.drafting)

    def _time(self, crowd: int, length: int, seconds: float) -> None:
        """Takes note of what a step took. What it was expected to take counts as one step from then on; if that was too
        much, so was what is still expected of others."""
        if (crowd, length) in self._told:
            self._told.discard((crowd, length))
            self._forget(crowd, length)
            less = min(1.0, seconds / self._seconds[crowd, length][0])
            for other in self._lengths[1:]:
                if (crowd, other) in self._told:
                    self._assume(crowd, other, less * self._seconds[crowd, other][0])
        self._seconds[crowd, length].append(seconds)

    def _count(self, seen: Seen, memory: float) -> None:
        """Takes note of what was accepted, by whose ``memory`` what was before is multiplied."""
        self._brings = []
        # Depths that were not tried are forgotten too: they may have become better.
        self._tried = [memory * each for each in self._tried]
        self._accepted = [memory * each for each in self._accepted]
        for depth in range(seen.ahead):
            self._tried[depth] += len(seen.accepted)
            self._accepted[depth] += sum(accepted > depth for accepted in seen.accepted)

    def _weigh(self, seen: Seen, crowd: int, seconds: float, plain: float, first: bool) -> None:
        """Takes note of what a step with drafts cost that took so many ``seconds``, a ``plain`` one of which takes that
        long, and whether, if it was a trial, there is another one at once: if it was the ``first`` of some, in which a
        model that drafts computes what it has missed; or brought enough; or if few sequences say little, and those
        behind the first have lost less than that one, without which there would be none."""
        tokens = 1 + sum(seen.accepted) / seen.sequences
        times, loss = self._seconds[crowd, seen.ahead], seconds - tokens * plain
        if first:
            usual = min(loss, DEARER * max(self._before or 0.0, plain))
            self._dear, self._before = 0.0 if self._before is None else usual, loss
            self._again, self._trials, self._behind = True, 0, 0.0
        else:
            usual = min(seconds, 2 * _usual(times) if times else seconds) - tokens * plain
            self._trials += 1
            self._behind += loss
            little = self._trials * seen.sequences < REPEATED and self._behind < (self._before or 0.0)
            self._again = tokens * plain > seconds or little
        self._balance = min(self._balance - usual, WINNINGS * plain)

    def _hopeless(self, crowd: int, seconds: float) -> bool:
        """Whether steps of so many ``seconds`` lose beside plain decoding whatever is drafted in them."""
        times = self._seconds[crowd, 0]
        return len(times) > 0 and self.tokens(self._lengths[-1]) * _usual(times) < seconds


def _usual(times: Iterable[float]) -> float:
    """The mean, to which the longest of three or more ``times`` adds no more than the next: steps whose drafts are
    longer take longer, and bring more, but one may have been disturbed."""
    ordered = sorted(times)
    if len(ordered) > 2:
        ordered[-1] = ordered[-2]
    return sum(ordered) / len(ordered)


def _crowd(sequences: int) -> int:
    """Crowds that are alike have the same number. Most are full, or nearly: powers of two are in the middle."""
    return round(math.log2(sequences))


@policy("speculate.controller", "measured")
class Measured(Controller):
    """Takes the number of drafted tokens that brings the most tokens a second by what was measured here: none where
    speculation loses.

    What a step takes is timed for a few lengths, the shorter ones first, by how many sequences go on (to a factor of
    two), and where one of them wins, once more for another one from time to time; what it brings is reckoned from how
    often tokens at each depth were accepted lately. Where drafting loses, some tokens are drafted now and then to see
    whether they are accepted by now: all such trials together lose no more than a share of the time, and what drafting
    has won for as many sequences lately.

    Attributes:
        trials: how often each length is timed before one is chosen.
        patience: steps without drafts after which some are drafted.
        share: of the time, what trials may lose beside plain decoding; a few steps more at the start.
        hope: how many standard errors are added to what is known of a depth.
        memory: by what the weight of what was accepted is multiplied in each step that drafts.
    """

    trials: Annotated[int, Field(ge=1, le=9)] = 3
    patience: Annotated[int, Field(ge=2, le=100_000)] = 96
    share: Annotated[float, Field(ge=0, le=1)] = 0.01
    hope: Annotated[float, Field(ge=0, le=4)] = 0.5
    memory: Annotated[float, Field(gt=0, le=1)] = 0.98

    @property
    def goes_by_time(self) -> bool:
        return True

    def start(self, most: int) -> Control:
        return Measuring(self, most)
