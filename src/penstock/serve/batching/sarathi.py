"""Chunked prefill with stall-free batches."""

from __future__ import annotations

from collections.abc import Sequence as List

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.queue import QueueBatcher
from penstock.serve.batching.stall_free import go_on
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class SarathiBatcher(QueueBatcher):
    """See :class:`Sarathi`."""

    def form(self, running: List[Sequence], room: Room) -> None:
        go_on(running, room)
        while room.tokens and (first := self._queue.first()) is not None and room.take(first):
            self._queue.pop()


@policy("serve.batching", "sarathi", papers=[200, 293])
class Sarathi(Batching):
    """Decodes first, so that no running sequence stalls; what is left of the token budget goes to chunks of the
    prompts under way, then to new ones (Sarathi-Serve).

    The budget of a step bounds the time between tokens. From the papers: chunked prefill, decodes piggybacked on it,
    the order of the three groups. Ours: within a group, sequences go by priority, then fairly among keys.
    """

    def start(self, limits: Limits) -> Batcher:
        return SarathiBatcher()
