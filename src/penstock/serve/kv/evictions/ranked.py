"""Orders by a number that each block has: what several policies share."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from penstock.serve.kv.evictions.contract import Tree

#: A heap is cleared up when it has so many entries, and as many times more than there are blocks.
SLACK = 4


class RankedOrder:
    """Of the blocks that lead to no other idle one, the one with the lowest rank goes first; of equals, the one that
    has been idle for the longest time.

    Args:
        tree: that the blocks are in.
        rank: of a block that becomes idle; numbers, or tuples of them.
    """

    def __init__(self, tree: Tree, rank: Callable[[int], Any]) -> None:
        self._tree, self._rank = tree, rank
        self._ranks: dict[int, tuple[Any, int]] = {}
        self._below: Counter[int] = Counter()
        self._heap: list[tuple[Any, int, int]] = []
        self._stamps = itertools.count()

    def add(self, block: int) -> None:
        above = self._tree.parent(block)
        if above is not None:
            self._below[above] += 1
        self._ranks[block] = self._rank(block), next(self._stamps)
        if not self._below[block]:
            self._push(block)

    def remove(self, block: int) -> None:
        del self._ranks[block]
        above = self._tree.parent(block)
        if above is not None:
            self._below[above] -= 1
            if above in self._ranks and not self._below[above]:
                self._push(above)

    def take(self) -> int:
        block = self.first()[1]
        self.remove(block)
        return block

    def first(self) -> tuple[Any, int]:
        """The rank of the block that goes next, and the block."""
        while not self._valid(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][0], self._heap[0][2]

    def rerank(self, change: Callable[[Any], Any]) -> None:
        """Gives each block the rank that ``change`` makes of its own."""
        self._ranks = {block: (change(rank), stamp) for block, (rank, stamp) in self._ranks.items()}
        self._clear_up()

    def _push(self, block: int) -> None:
        heappush(self._heap, (*self._ranks[block], block))
        if len(self._heap) > SLACK * (len(self._ranks) + SLACK):
            self._clear_up()

    def _clear_up(self) -> None:
        """Leaves those in the heap that can go."""
        self._heap = [(*ranked, block) for block, ranked in self._ranks.items() if not self._below[block]]
        heapify(self._heap)

    def _valid(self, entry: tuple[Any, int, int]) -> bool:
        rank, stamp, block = entry
        return self._ranks.get(block) == (rank, stamp) and not self._below[block]

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranks)

    def __contains__(self, block: object) -> bool:
        return block in self._ranks


class Memories:
    """How often blocks were used that have been evicted, by their names, up to ``most`` of them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._uses: dict[bytes, int] = {}

    def write(self, name: bytes, uses: int) -> None:
        """A block was evicted that was used so often in all."""
        self._uses.pop(name, None)
        self._uses[name] = uses
        if len(self._uses) > self._most:
            del self._uses[next(iter(self._uses))]

    def read(self, name: bytes) -> int:
        """How often it was used before; 0 where that is not known."""
        return self._uses.get(name, 0)
