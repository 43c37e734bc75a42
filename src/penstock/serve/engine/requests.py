"""Which requests an engine has, and when they end at the latest."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush

from penstock.core.errors import UsageError
from penstock.serve.engine.adapters import Adapter
from penstock.serve.engine.sequence import Sequence


class Requests:
    """The requests of an engine, by id: those under way, and those that have ended and were kept."""

    def __init__(self) -> None:
        self._under_way: dict[str, list[Sequence]] = {}
        self._kept: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        """How many are under way."""
        return len(self._under_way)

    def __contains__(self, id: object) -> bool:
        """Whether the request ``id`` is under way."""
        return id in self._under_way

    def of(self, id: str) -> tuple[Sequence, ...]:
        """The continuations of the request ``id`` that are under way."""
        return tuple(self._under_way.get(id, ()))

    def living(self, id: str, index: int) -> Sequence:
        """The continuation ``index`` of the request ``id``, which is under way.

        Raises:
            UsageError: there is no such.
        """
        for sequence in self._under_way.get(id, ()):
            if sequence.index == index:
                return sequence
        raise UsageError(f"there is no continuation {index} of a request {id!r} under way")

    def parent(self, id: str, index: int) -> Sequence:
        """What others can go on from: the request ``id`` that was kept, or its continuation ``index`` under way.

        Raises:
            UsageError: there is no such.
        """
        return self._kept.get(id) or self.living(id, index)

    def check_new(self, id: str) -> None:
        """Refuses the id of a request that is here already.

        Raises:
            UsageError: it is under way, or kept.
        """
        if id in self._under_way or id in self._kept:
            raise UsageError(f"a request {id!r} is under way already, or kept")

    def enter(self, sequence: Sequence) -> None:
        """``sequence`` is under way. Its time begins now, where its request has a deadline."""
        request = sequence.request
        if request.deadline is not None:
            sequence.deadline = time.monotonic() + request.deadline
            heappush(self._deadlines, (sequence.deadline, sequence.arrival, sequence))
        self._under_way.setdefault(request.id, []).append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """``sequence`` has ended; it is kept where its request wants that."""
        id = sequence.request.id
        if sequence.request.keep:
            self._kept[id] = sequence
        siblings = self._under_way[id]
        siblings.remove(sequence)
        if not siblings:
            del self._under_way[id]

    def forget(self, id: str) -> Sequence | None:
        """The request ``id`` is kept no longer: its sequence, or None of an unknown one."""
        return self._kept.pop(id, None)

    def kept_blocks(self, ids: Iterable[str]) -> int:
        """How many blocks the requests ``ids`` hold that were kept, each counted once."""
        found = (self._kept[id].held for id in ids if id in self._kept)
        return len({block for held in found if held is not None for block in held.blocks})

    def adapters(self) -> set[Adapter]:
        """Those of all that are under way or kept."""
        living = (sequence for own in self._under_way.values() for sequence in own)
        return {sequence.adapter for sequence in (*living, *self._kept.values())}

    @property
    def due(self) -> float | None:
        """Seconds until the next one under way passes its deadline; None where none has one."""
        while self._deadlines and self._deadlines[0][2].finish is not None:
            heappop(self._deadlines)
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def expired(self) -> Iterator[Sequence]:
        """Those under way that have passed their deadlines. Each is told once, to be ended."""
        while self._deadlines and self._deadlines[0][0] <= time.monotonic():
            _, _, sequence = heappop(self._deadlines)
            if sequence.finish is None:
                yield sequence
