"""A length drawn by what is believed of the acceptance."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from penstock.core.randomness import numpy_generator
from penstock.policy import policy
from penstock.speculate.controllers.contract import Control, Controller, Seen
from penstock.speculate.expected import chain_tokens


class Believing(Control):
    """See :class:`Thompson`."""

    def __init__(self, policy: Thompson, most: int) -> None:
        self._policy, self._most = policy, most
        self._hits = self._misses = 0.0
        self._draw = numpy_generator(policy.seed, "speculate/thompson")

    def ahead(self, sequences: int) -> int:
        acceptance = float(self._draw.beta(1 + self._hits, 1 + self._misses))
        return best_length(acceptance, self._policy.cost, self._most)

    def learn(self, seen: Seen) -> None:
        hits = sum(seen.accepted)
        misses = sum(kept < drafted for drafted, kept in zip(seen.drafted, seen.accepted, strict=True))
        self._hits = self._policy.memory * self._hits + hits
        self._misses = self._policy.memory * self._misses + misses


@policy("speculate.controller", "thompson", papers=[162])
class Thompson(Controller):
    """Draws an acceptance from what is believed of it, and takes the length that would be best for that.

    From the paper: Thompson sampling decides how many tokens are drafted. From knowledge: each token that was accepted
    and each that was rejected is a trial of a Beta belief. Ours: the best length is that of the most tokens a unit of
    time, a drafted token taking ``cost`` and the verification 1; one length for all sequences of a step; and old trials
    fade, since texts change. At least one token is drafted.

    Attributes:
        cost: what a drafted token costs, beside a pass of the target, with what it adds to that.
        memory: by what the weight of old trials is multiplied in each step; 1 forgets nothing.
        seed: of the draws.
    """

    cost: Annotated[float, Field(gt=0, le=10)] = 0.25
    memory: Annotated[float, Field(gt=0, le=1)] = 0.99
    seed: int = 0

    def start(self, most: int) -> Control:
        return Believing(self, most)


def best_length(acceptance: float, cost: float, most: int) -> int:
    """The length from 1 to ``most`` that brings the most tokens a unit of time, where the target's pass takes 1 and
    each drafted token ``cost``."""
    return max(range(1, most + 1), key=lambda length: chain_tokens(acceptance, length) / (1 + cost * length))
