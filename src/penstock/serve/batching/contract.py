"""The contract ``serve.batching``: what the next step of the engine computes."""

from __future__ import annotations

from collections.abc import Sequence as List
from typing import ClassVar, Protocol, Self

from penstock.policy import Policy, contract
from penstock.serve.engine.batch import Entry
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class Room(Protocol):
    """What is left of a step while its batch is formed. The engine keeps the books: a batcher cannot overspend."""

    @property
    def tokens(self) -> int:
        """Tokens of the budget that are left."""
        ...

    @property
    def entries(self) -> List[Entry]:
        """What was taken so far, in order."""
        ...

    def take(self, sequence: Sequence, most: int | None = None) -> int:
        """Puts up to ``most`` of the remaining tokens of ``sequence`` into the batch; returns how many.

        A running sequence gets what the budget allows; where blocks are short, the last of the others are preempted
        for it, and come back through :meth:`Batcher.add`. A waiting one is admitted if the cache has room for all of
        its tokens: prefixes that are in the cache are taken from there, and count for nothing.

        0 means that there is no room for it in this step: neither budget, slot nor blocks, or that a running sequence
        was itself preempted. A sequence can be taken once in a step.
        """
        ...

    def split(self, *counts: int, lead: int = 0) -> None:
        """Splits what was taken into parts of so many entries each, in order, to be computed at the same time. Of
        these the part ``lead`` goes first where two want the same. Called last, where at all.

        A cut between entries that belong together moves on behind them, and is lost where that is the end: one entry
        may read what another writes in the same step, a prefix that both have.

        Raises:
            ValueError: the counts are not all positive, do not add up to the entries, or are fewer than ``lead`` says.
        """
        ...


class Batcher(Protocol):
    """The state of a batching policy in one engine: it holds the sequences that wait."""

    @property
    def waiting(self) -> int:
        """How many sequences wait."""
        ...

    def add(self, sequence: Sequence) -> None:
        """A sequence arrives, or comes back after preemption."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """A sequence that waits is aborted."""
        ...

    def form(self, running: List[Sequence], room: Room) -> None:
        """Takes the next batch from ``room``. ``running`` are the sequences with memory that have something to
        compute, by priority and arrival."""
        ...


@contract(
    "serve.batching",
    law="where no two choices are within rounding of each other (played in float32 on a CPU), tokens of each request, "
    "greedy and drawn, identical to the request decoded alone, for any arrivals, lengths, shared prefixes, aborts and "
    "preemptions; token budget and blocks never exceeded; every request finishes; no block lost; of those who wait, "
    "the urgent go in first, whatever their keys; nobody waits for ever while others come, of whatever length or key; "
    "keys that wait get tokens alike, to within a few requests, where the policy tells them apart; parts of a step do "
    "not depend on each other",
)
class Batching(Policy):
    """Forms the batch of each step.

    Attributes:
        fair: whether keys that wait at the same priority are given tokens alike; else keys are not told from each
            other.
    """

    fair: ClassVar[bool] = True

    def start(self, limits: Limits) -> Batcher:
        """A batcher for an engine with ``limits``."""
        raise NotImplementedError

    def at_work(self) -> Self:
        """What the law plays: this policy itself, or one that does what it is for, where by default it does not."""
        return self
