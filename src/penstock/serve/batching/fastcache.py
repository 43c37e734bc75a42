"""Prefill, compression and decode as stages of their own."""

from __future__ import annotations

from collections.abc import Sequence as List

from pydantic import PositiveInt

from penstock.policy import policy
from penstock.serve.batching.contract import Batcher, Batching, Room
from penstock.serve.batching.queue import QueueBatcher
from penstock.serve.engine.limits import Limits
from penstock.serve.engine.sequence import Sequence


class FastCacheBatcher(QueueBatcher):
    """See :class:`FastCache`."""

    def __init__(self, together: int, patience: int) -> None:
        super().__init__()
        self._together, self._patience = together, patience
        self._waited = 0
        self._decodes_next = False

    def form(self, running: List[Sequence], room: Room) -> None:
        self._waited = self._waited + 1 if self.waiting else 0
        decoding = [sequence for sequence in running if sequence.decoding]
        prepared = 0
        if not decoding or (not self._decodes_next and self._gathered(running)):
            prepared = self._prefill(running, room)
        if not prepared:
            for sequence in decoding:
                room.take(sequence)
        self._decodes_next = prepared > 0

    def _gathered(self, running: List[Sequence]) -> bool:
        """Whether there is enough for a batch of prompts."""
        under_way = any(not sequence.decoding for sequence in running)
        return under_way or self.waiting >= self._together or self._waited > self._patience

    def _prefill(self, running: List[Sequence], room: Room) -> int:
        """Takes prompts under way, then new ones, as many as there is room for; returns how many tokens."""
        prepared = sum(room.take(sequence) for sequence in running if not sequence.decoding)
        while room.tokens and (first := self._queue.first()) is not None and (taken := room.take(first)):
            prepared += taken
            self._queue.pop()
        if prepared:
            self._waited = 0
        return prepared


@policy("serve.batching", "fastcache", papers=[276])
class FastCache(Batching):
    """Gathers prompts into batches of their own, so that the caches of those that end together are compressed together
    before all that live decode on: three stages, prefill, compression and decode, each in batches (FastCache).

    From the paper [276]: the three stages, whose batches are formed as requests come; a cache in blocks of one size,
    which are the pool's again at once. Ours: when a batch of prompts is formed, which is once ``together`` of them
    wait, or one has waited for ``patience`` steps, or nobody decodes; and that such a step is followed by one of
    decoding. Compression is the engine's own affair, under every policy: caches that are due in a step are compressed
    in one stage before it. Not built: the encoders of images, and stages on devices of their own.

    Attributes:
        together: how many prompts make a batch.
        patience: how many steps a prompt waits for others.
    """

    together: PositiveInt = 8
    patience: PositiveInt = 8

    def start(self, limits: Limits) -> Batcher:
        return FastCacheBatcher(min(self.together, limits.sequences), self.patience)
