"""What sequences that are admitted take from outside of the prefix tree."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np

from penstock.serve.engine.memory.blocks import Blocks
from penstock.serve.engine.memory.compression import Compression
from penstock.serve.engine.memory.prefixes import Prefixes
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.chunks import Chunks
from penstock.serve.kv.pool import name_behind
from penstock.serve.kv.reuse.contract import Reuse


class Returning:
    """Brings back blocks that left the pool, from the tiers, and moves contexts that were cached by themselves to where
    they are wanted.

    Args:
        blocks: of the cache.
        prefixes: that the tree has.
        compression: of caches.
        reuse: how contexts of requests are encoded.

    Attributes:
        chunks: which contexts are cached by themselves.
        restored: blocks that came back, or were filled from elsewhere.
    """

    def __init__(self, blocks: Blocks, prefixes: Prefixes, compression: Compression, reuse: Reuse) -> None:
        self._blocks, self._prefixes, self._compression = blocks, prefixes, compression
        self.chunks = Chunks(blocks.pool, reuse, blocks.take, blocks.tiers)
        self.restored: list[int] = []

    def fetch(self, sequence: Sequence, seconds: float) -> list[Future[bool]]:
        """Begins to read from disk what a waiting sequence begins with; it can be admitted once all of it is done. What
        is sooner computed, at so many ``seconds`` for a token, is left there."""
        tiers = self._blocks.tiers
        if tiers is None or not tiers.lasting:
            return []
        coming = []
        for member in sequence.members:
            found = self._prefixes.match(member)
            names = self._names(member, found[-1] if found else None, len(found))
            coming += tiers.fetch(names, seconds * self._blocks.size)
            coming += self.chunks.fetch(member.chunks)
        return coming

    def restore(self, sequence: Sequence) -> None:
        """Brings back what one who was admitted begins with, behind what the pool has of it."""
        held, size, tiers = sequence.held, self._blocks.size, self._blocks.tiers
        assert held is not None
        # Whole blocks come back, behind the last one that the tree knows: their names follow from its name.
        if tiers is None or held.dropped or held.computed % size or held.committed < len(held.blocks):
            return
        last = held.blocks[-1] if held.blocks else None
        found = tiers.find(self._names(sequence, last, len(held.blocks)))
        blocks = self._blocks.take(min(len(found), self._blocks.pool.available))
        # What left the pool for these may have taken places of what was found.
        found = tiers.find(list(found)[: len(blocks)])
        if not self._busy().isdisjoint(blocks):
            found = {}
        self._blocks.pool.release(blocks[len(found) :])
        del blocks[len(found) :]
        if not blocks:
            return
        tiers.load(list(found.values()), blocks)
        self.restored += blocks
        self._blocks.append(held, blocks)
        held.computed = min(held.computed + len(blocks) * size, len(sequence.tokens))
        self._compression.see(sequence, held)
        self._prefixes.commit(sequence)

    def fill(self, sequence: Sequence) -> None:
        """One who was admitted takes what is cached of its contexts by themselves."""
        held = sequence.held
        if not sequence.chunks or held is None:
            return
        fresh = -(-len(sequence.tokens) // self._blocks.size) - len(held.blocks)
        taken = self.chunks.find(sequence.chunks, held.computed, fresh)
        sequence.exact = min((each.chunk.start for each in taken if not each.whole), default=sequence.limit)
        if taken:
            blocks = self._blocks.take(fresh)
            self._blocks.append(held, blocks)
            self.restored += blocks  # some of their tokens nobody computes
            places = self._blocks.places(held.blocks, len(sequence.tokens))
            filled = [each.chunk.start + each.places for each in taken]
            for each, own in zip(taken, filled, strict=True):
                self.chunks.move(each, places[own])
                held.renewed += 0 if each.whole else len(each.chunk.tokens) - len(own)
            held.filled = np.concatenate(filled)
            held.moved = len(held.filled)
            held.advance(0)

    def keep(self, sequence: Sequence) -> None:
        """The prompt of a running sequence is about to be computed to its end: its contexts are cached. Blocks are
        taken for them that nobody wants in this step."""
        held = sequence.held
        assert held is not None
        self.chunks.keep(sequence.chunks, self._blocks.places(held.blocks, sequence.prompt))

    def forget(self) -> None:
        """What the cache holds is void."""
        self.chunks.forget()
        self.restored.clear()

    def _names(self, sequence: Sequence, last: int | None, first: int) -> Iterator[bytes]:
        """Of the blocks that a sequence begins with, from the block number ``first`` on, which is behind the block
        ``last`` of the tree."""
        name = sequence.adapter.key if last is None else self._blocks.pool.name(last)
        for tokens in sequence.blocks(self._blocks.size, self._prefixes.findable(sequence), first):
            name = name_behind(name, tokens)
            yield name

    def _busy(self) -> set[int]:
        """Blocks that are read or written before the next step: what comes back at once must not get there."""
        places = [each for work in self._compression.pending for each in (work.sources, work.targets)]
        moved = np.unique(np.concatenate(places) // self._blocks.size).tolist() if places else []
        return {*itertools.chain(*self._blocks.copies), *moved, *self.chunks.busy}
