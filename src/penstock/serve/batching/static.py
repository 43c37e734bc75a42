"""Batches that stay as they are until all of their requests have ended."""

from __future__ import annotations

from collections.abc import Sequence as List

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.queue import QueueBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class StaticBatcher(QueueBatcher):
    """See :class:`Static`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._batch: list[Sequence] = []
        self._places = 0  # of the batch, for those who were there when it began and are still to be let in

    def form(self, running: List[Sequence], room: Room) -> None:
        self._batch = [sequence for sequence in self._batch if sequence.running]
        if not self._batch:
            self._places = min(self.waiting, self._most)
        prepared = sum(room.take(sequence) for sequence in running if not sequence.decoding)
        while room.tokens and self._places and (first := self._queue.first()) is not None:
            if not (taken := room.take(first)):
                self._places = 0  # neither slots nor blocks are left: the batch is what it is
                break
            prepared += taken
            self._places -= 1
            self._batch.append(self._queue.pop())
        if not prepared:
            for sequence in running:
                room.take(sequence)


@policy("serve.batching", "static")
class Static(Batching):
    """Batches of requests: those who wait when nobody runs go in together, as many as there are slots and blocks for,
    and the next ones once the last of these has ended. There to compare with: this is how servers batched before Orca,
    FasterTransformer's among them.

    Prompts are computed first, in as many steps as the token budget makes of them; then all decode. Ours: whoever ends
    early gives back slot and blocks at once, and computes nothing to fill up the batch; one that lost its memory is of
    the next batch.
    """

    def start(self, limits: Limits) -> Batcher:
        return StaticBatcher(limits.sequences)
