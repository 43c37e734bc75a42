"""The blocks of the cache, as sequences hold them."""

from __future__ import annotations

from collections.abc import Sequence as List

import numpy as np

from penstock.serve.engine.memory.held import Held
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.pool import BlockPool
from penstock.serve.kv.tiers import Tiers


class Blocks:
    """Takes blocks from the pool, lists them in the tables, and lets them go. What leaves the pool goes to the tiers.

    Args:
        slots: most sequences at a time.
        blocks: of the cache.
        block_size: how many tokens a block holds.
        context: most tokens of a sequence.
        eviction: the order in which blocks that nobody holds go.
        tiers: where evicted blocks go, and come back from.

    Attributes:
        pool: their books, with the prefix tree.
        size: tokens of a block.
        tables: int32 [slots, most blocks of a sequence], the blocks of each slot's sequence.
        copies: blocks (from, to) that have to be copied before anything else is computed.
    """

    def __init__(
        self, slots: int, blocks: int, block_size: int, context: int, eviction: Eviction, tiers: Tiers | None
    ) -> None:
        self.pool, self.size, self.tiers = BlockPool(blocks, block_size, eviction.start), block_size, tiers
        self.tables = np.zeros((slots, -(-context // block_size)), np.int32)
        self.copies: list[tuple[int, int]] = []
        self._leaving: list[tuple[bytes, int]] = []
        if tiers is not None:
            self.pool.on_evict = lambda block: self._leaving.append((self.pool.name(block), block))

    def take(self, count: int) -> list[int]:
        """Blocks of the pool; what has to leave for them is kept in the tiers."""
        taken = self.pool.take(count)
        if self.tiers is not None and self._leaving:
            self.tiers.keep(self._leaving)
            self._leaving = []
        return taken

    def append(self, held: Held, blocks: List[int]) -> None:
        """``blocks`` are the next ones of what is ``held``."""
        first = len(held.blocks)
        held.blocks += blocks
        assert held.slot is not None
        self.tables[held.slot, first : len(held.blocks)] = blocks

    def release(self, blocks: List[int]) -> None:
        """Lets go of the ``blocks`` of a sequence, and keeps them where they outlive the engine."""
        if self.tiers is not None and self.tiers.lasting:
            known = [block for block in reversed(blocks) if self.pool.known(block)]
            self.tiers.keep([(self.pool.name(block), block) for block in known])
        self.pool.release(blocks)

    def forget(self) -> None:
        """What they hold is void; nobody holds any."""
        self.pool.forget()
        self.copies.clear()
        self._leaving.clear()

    def needs(self, growing: list[tuple[Held, int]]) -> list[tuple[Held, int, bool]]:
        """Of those that need any for so many more tokens: how many fresh blocks, and whether the next token goes to a
        block that is not this sequence's alone, as it may after a fork."""
        size, needs = self.size, []
        for held, count in growing:
            place, has = held.computed - held.dropped, len(held.blocks)
            fresh, first = -(-(place + count) // size) - has, place // size
            frozen = first < has and self.pool.frozen(held.blocks[first])
            if fresh > 0 or frozen:
                needs.append((held, max(fresh, 0), frozen))
        return needs

    def own(self, held: Held) -> None:
        """A copy, for the sequence alone, of the block that its next token goes to."""
        first = held.places // self.size
        (fresh,) = self.take(1)
        self.copies.append((held.blocks[first], fresh))
        self.pool.release([held.blocks[first]])
        held.blocks[first] = fresh
        assert held.slot is not None
        self.tables[held.slot, first] = fresh

    def places(self, blocks: List[int], count: int) -> np.ndarray:
        """The places in the memory of the first ``count`` tokens in ``blocks``, int64."""
        return (np.array(blocks, np.int64)[:, None] * self.size + np.arange(self.size)).reshape(-1)[:count]
