"""The contract ``speculate.controller``: how many tokens are drafted for the sequences of a step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from penstock.policy import Policy, contract


@dataclasses.dataclass(frozen=True)
class Seen:
    """A step in which sequences went on for which tokens may be drafted, and what came of it.

    Attributes:
        sequences: how many sequences went on, with those for which nothing may be drafted.
        prompts: tokens of prompts that were computed in the same step.
        ahead: how many tokens were to be drafted at most.
        drafted: how many were verified, of each sequence for which some may be.
        accepted: how many of those were accepted.
        drafting: seconds that the drafting took.
        seconds: that the step took, with the drafting.
    """

    sequences: int
    prompts: int
    ahead: int
    drafted: Sequence[int]
    accepted: Sequence[int]
    drafting: float
    seconds: float


class Control:
    """A controller at work in one engine."""

    def ahead(self, sequences: int) -> int:
        """How many tokens may be drafted for each of ``sequences`` in the next step; 0: nothing is drafted."""
        raise NotImplementedError

    def kept(self, confidence: Sequence[Sequence[float]]) -> list[int]:
        """How many of the first drafted tokens of each sequence are verified: here all. Asked where the controller
        weighs.

        Args:
            confidence: of each sequence and each of its drafted tokens, the probability of the token that was the
                likeliest in its place. It is not that of the token that was drafted: whether a place is verified must
                not depend on what was drawn for it, or the output would no longer have the target's distribution.
        """
        return [len(each) for each in confidence]

    def learn(self, seen: Seen) -> None:
        """A step is over."""


@contract(
    "speculate.controller",
    law="no more is drafted than the drafter can, and no more is verified than was drafted, whatever was seen before; "
    "two that have seen the same decide the same; the tokens that come out are the target's",
)
class Controller(Policy):
    """Decides how many tokens are drafted."""

    @property
    def weighs(self) -> bool:
        """Whether it chooses among drafted tokens by how sure the drafter was of them."""
        return False

    def start(self, most: int) -> Control:
        """One for an engine whose drafter drafts ``most`` tokens at a time at most."""
        raise NotImplementedError
