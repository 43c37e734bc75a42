"""What a running sequence holds, and what one that waits finds."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from penstock.serve.kv.pool import ROOT

#: Of a cache that is not compressed, when it is due.
NEVER = 1 << 62

NO_PLACES = np.empty(0, np.int64)


@dataclasses.dataclass(eq=False)
class Held:
    """What a running sequence holds.

    Attributes:
        slot: its row in the tables; None of a context of which nothing remains to be computed.
        blocks: its blocks of the cache, in order.
        computed: tokens whose keys and values were computed, or will be once the queued work is done.
        dropped: how many of them are not in the blocks any more, since the cache was compressed when it had been
            ``compacted`` tokens; ``known`` tokens were left.
        due: how many are computed when it is compressed next.
        written: the most places that it had in the blocks since it was compressed last: where windows are in full
            precision, later ones are in the places of earlier ones then.
        probed: how many probes stood behind the token that the newest one follows; their states are kept for it.
        ripe: from how many on it may be compressed where blocks are missing.
        seen: from how many on its slot has all queries that the policy could ask about.
        committed: how many of the blocks are in the prefix tree, the last of them at ``node``; without such, its root.
        filled: int64, ascending, which tokens behind the ``computed`` ones are in the blocks already, or will be.
        moved, renewed: of its contexts that were cached by themselves, how many tokens were taken, and how many are
            computed again.
    """

    slot: int | None
    blocks: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    dropped: int = 0
    compacted: int = 0
    known: int = 0
    due: int = NEVER
    written: int = 0
    probed: int = 0
    ripe: int = NEVER
    seen: int = 0
    committed: int = 0
    node: int = ROOT
    filled: np.ndarray = dataclasses.field(default_factory=lambda: NO_PLACES)
    moved: int = 0
    renewed: int = 0

    def runs(self, count: int) -> list[tuple[int, int]]:
        """The next ``count`` tokens to be computed, those in a row together: where they begin, and how many."""
        if not self.filled.size:
            return [(self.computed, count)]
        # Wherever the filled ones are, `count` of so many are left.
        ahead = np.arange(self.computed, self.computed + count + len(self.filled))
        places = np.setdiff1d(ahead, self.filled, assume_unique=True)[:count]
        pieces = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        return [(int(piece[0]), len(piece)) for piece in pieces]

    def advance(self, count: int) -> None:
        """The next ``count`` tokens are computed, and with them those in the blocks directly behind them."""
        if not self.filled.size:
            self.computed += count
            return
        if count:
            start, length = self.runs(count)[-1]
            self.computed = start + length
        self.filled = self.filled[np.searchsorted(self.filled, self.computed) :]
        row = int((self.filled == self.computed + np.arange(len(self.filled))).sum())
        self.computed, self.filled = self.computed + row, self.filled[row:]

    @property
    def places(self) -> int:
        """Tokens in the blocks."""
        return self.computed - self.dropped

    @property
    def since(self) -> int:
        """From which place on windows in full precision are counted: behind what was left when it was compressed."""
        return self.known if self.dropped else 0


class Prefix(NamedTuple):
    """What a sequence finds of its first tokens: the blocks, how many tokens were computed, and, where that cache was
    compressed, what :class:`Held` has of it, and what the sequence has of where."""

    blocks: list[int]
    computed: int
    dropped: int = 0
    compacted: int = 0
    known: int = 0
    compressed: tuple[int, ...] = ()
