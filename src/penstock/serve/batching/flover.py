"""Temporal fusion."""

from __future__ import annotations

from collections.abc import Sequence as List

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.queue import QueueBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class FloverBatcher(QueueBatcher):
    """See :class:`Flover`."""

    def form(self, running: List[Sequence], room: Room) -> None:
        prepared = sum(room.take(sequence) for sequence in running if not sequence.decoding)
        while room.tokens and (first := self._queue.first()) is not None and (taken := room.take(first)):
            prepared += taken
            self._queue.pop()
        if not prepared:
            for sequence in running:
                room.take(sequence)


@policy("serve.batching", "flover", papers=[77])
class Flover(Batching):
    """Pre-processing and token generation are steps of different kinds: whole prompts of what has arrived, or one
    token for all that live, never both (Flover's temporal fusion).

    From the paper: the two phases, the one generation loop that all live requests share, which a request joins at the
    next token and leaves at its last. What sets it apart from ``orca`` is that no step mixes the phases: generation
    steps are as short as can be, and wait while prompts are prepared. The paper's reordering of buffers, which closes
    the gap that a finished request leaves, is the engine's own affair here, under every policy: each step's rows are
    laid out anew without gaps, and blocks of a paged cache need not be neighbours.
    """

    def start(self, limits: Limits) -> Batcher:
        return FloverBatcher()
