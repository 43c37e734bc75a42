"""When to stop drafting, decided exactly: processes by which drafted tokens are accepted, and what a decision costs.

The process is the paper's Markov decision process [374] with all that a text does to it left out but the acceptances.
A round drafts tokens one by one. Of each the probability is known that it is accepted if those before it were; it is
one of the :attr:`Process.chances`, drawn for each token alike. Behind each token, and before the first, the round may
be ended: then the target verifies what was drafted, which brings the accepted tokens and one more. A pass of the target
takes 1, a drafted token :attr:`Process.cost`. Rounds renew themselves, so what a decision costs in the long run is the
mean time of a round for each token that it brings in the mean.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

#: What a decision sees: the chances of the tokens that were drafted in this round; whether there is to be another.
Decision = Callable[[Sequence[float]], bool]


@dataclasses.dataclass(frozen=True)
class Process:
    """How drafted tokens are accepted.

    Attributes:
        chances: probabilities that a token is accepted if those before it were, each with its weight; these add up to
            1.
        cost: the time for a drafted token; the target's pass takes 1.
        most: how many tokens a round may draft.
    """

    chances: tuple[tuple[float, float], ...]
    cost: float
    most: int

    @property
    def mean(self) -> float:
        """The probability that a token is accepted of which no more is known."""
        return sum(chance * weight for chance, weight in self.chances)


def cost_of(process: Process, decision: Decision) -> float:
    """The time for each token in the long run, by enumeration of all rounds."""

    def ahead(drafted: tuple[float, ...]) -> tuple[float, float]:
        """What is still to come of a round: its time and its tokens, in the mean."""
        if len(drafted) == process.most or not decision(drafted):
            return 1.0, 1.0
        time, tokens = process.cost, 0.0
        for chance, weight in process.chances:
            more_time, more_tokens = ahead((*drafted, chance))
            time += weight * more_time
            # Only what is accepted with all before it counts.
            tokens += weight * (math.prod(drafted) * chance + more_tokens)
        return time, tokens

    time, tokens = ahead(())
    return time / tokens


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best that can be done.

    Attributes:
        cost: the time for each token in the long run.
        goes_on: for each depth and each probability that all so far are accepted, whether another token is drafted.
    """

    cost: float
    goes_on: dict[tuple[int, float], bool]


def optimum(process: Process) -> Optimum:
    """By value iteration over (depth, probability that all are accepted), which is all that what follows depends on,
    for a price of time; and over prices (Dinkelbach), until a round is worth nothing: then the price is the best rate.
    """
    cost = 1.0  # without drafts
    while True:
        goes_on = _decisions(process, cost)
        decided = cost_of(process, functools.partial(_decided, goes_on))
        if decided > cost * (1 - 1e-13):
            return Optimum(cost, goes_on)
        cost = decided


def _decisions(process: Process, cost: float) -> dict[tuple[int, float], bool]:
    """Whether more is gained from each state on than by a stop there, where a token is worth ``cost``. Backwards from
    the deepest states, whose values are known, one sweep of value iteration is enough."""
    levels = [{1.0}]
    for _ in range(process.most):
        levels.append({_rounded(product * chance) for product in levels[-1] for chance, _ in process.chances})
    values = {(process.most, product): 0.0 for product in levels[-1]}
    goes_on = dict.fromkeys(values, False)
    for depth in reversed(range(process.most)):
        for product in levels[depth]:
            gain = -process.cost
            for chance, weight in process.chances:
                reached = _rounded(product * chance)
                gain += weight * (cost * reached + values[depth + 1, reached])
            values[depth, product], goes_on[depth, product] = max(0.0, gain), gain > 1e-12
    return goes_on


def best_threshold(process: Process, cost: float) -> float:
    """The probability of a rejection beyond which a round is ended best, where a token takes ``cost`` in the long run:
    another token brings ``mean`` times the probability that none is rejected so far, each worth ``cost``, and takes
    the draft's time. That probability only falls, so whoever stops now would have stopped later as well: looking one
    token ahead is enough."""
    return 1 - process.cost / (cost * process.mean)


def _decided(goes_on: dict[tuple[int, float], bool], drafted: Sequence[float]) -> bool:
    return goes_on[len(drafted), _rounded(math.prod(drafted))]


def _rounded(product: float) -> float:
    """Products of the same chances in another order are one state."""
    return round(product, 12)
