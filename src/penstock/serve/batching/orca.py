"""Iteration-level scheduling."""

from __future__ import annotations

from collections.abc import Sequence as List

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.queue import QueueBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class OrcaBatcher(QueueBatcher):
    """See :class:`Orca`."""

    def form(self, running: List[Sequence], room: Room) -> None:
        for sequence in running:
            room.take(sequence)
        while (first := self._queue.first()) is not None and room.take(first):
            self._queue.pop()


@policy("serve.batching", "orca")
class Orca(Batching):
    """Every iteration, all running sequences go on by what they have to compute, and waiting ones are admitted, whole
    prompts at a time, while budget, slots and blocks last (Orca, Yu et al. 2022).

    A prompt longer than what is left of the token budget is computed in pieces all the same, since a step's budget is
    a promise; Orca itself has none.
    """

    def start(self, limits: Limits) -> Batcher:
        return OrcaBatcher()
