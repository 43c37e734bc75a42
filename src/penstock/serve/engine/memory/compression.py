"""When caches of sequences are compressed, and what is left of them then."""

from __future__ import annotations

from penstock.serve.engine.memory.blocks import Blocks
from penstock.serve.engine.memory.held import NEVER, Held
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.compaction import Compaction
from penstock.serve.kv.policies.contract import CachePolicy


class Compression:
    """Says when the caches of sequences are due, and moves what is left of them to fresh blocks.

    Args:
        policy: what the cache of a sequence keeps.
        blocks: of the cache.
        tentative: most tokens of a sequence that one step may compute for nothing, since they were drafted.

    Attributes:
        pending: what has to be compressed before anything else is done.
    """

    def __init__(self, policy: CachePolicy, blocks: Blocks, tentative: int) -> None:
        self.policy, self._blocks, self._tentative = policy, blocks, tentative
        self.pending: list[Compaction] = []

    # When

    def due(self, sequence: Sequence, computed: int, dropped: int) -> int:
        """When a cache is compressed next, whoever else there is."""
        if sequence.keeps_all:
            return NEVER
        if self.policy.patient:
            return next((place for place in sequence.compressed if place > computed), NEVER)
        due = self.policy.due(sequence.prompt, computed, dropped)
        return NEVER if due is None else due

    def schedule(self, sequence: Sequence, held: Held) -> None:
        """Says when what is ``held`` is compressed next. Where it was before, it may not be anywhere else."""
        held.due, held.ripe = self.due(sequence, held.compacted, held.dropped), NEVER
        if self.policy.patient and held.due == NEVER and not sequence.keeps_all:
            ripe = self.policy.due(sequence.prompt, held.compacted, held.dropped)
            held.ripe = NEVER if ripe is None else max(ripe, held.seen)

    def see(self, sequence: Sequence, held: Held) -> None:
        """What is ``held`` was computed by others: the slot has none of its queries, and it may be computed in the step
        that is being formed."""
        held.seen = held.computed + max(1, self.policy.watches) if held.computed else 0
        self.schedule(sequence, held)

    def press(self, sequence: Sequence) -> None:
        """The cache of a running sequence is due: it is compressed before more of it is computed."""
        held = sequence.held
        assert held is not None
        sequence.compressed.append(held.computed)
        self.schedule(sequence, held)

    def cut(self, sequence: Sequence, held: Held, computed: int) -> int:
        """What is ``held`` is cut back to its first ``computed`` tokens, or to none where the cache was compressed
        since. Returns to how many."""
        # Queries of tokens that are cut off have taken the places of earlier ones.
        held.seen = max(held.seen, held.computed - self._tentative) if self.policy.watches else held.seen
        if held.dropped and computed < held.compacted:
            computed, held.dropped, held.compacted, held.known, held.seen = 0, 0, 0, 0, 0
            held.written = 0
        self.schedule(sequence, held)
        return computed

    # What is left

    def packed(self, held: Held) -> int:
        """How many tokens share the first places of what is ``held``, see :meth:`CachePolicy.packed`."""
        return self.policy.packed(held.compacted) if held.dropped else 0

    def gain(self, sequence: Sequence) -> int:
        """How many more blocks were available if the cache of a running sequence was compressed now: 0 where it may not
        be, such as while what it said already is computed again."""
        held = sequence.held
        if held is None or held.computed < held.ripe:
            return 0
        # What it said already was said behind the caches of `compressed`, and has to be computed behind the same.
        if sequence.remaining > 1 and len(sequence.tokens) > sequence.prompt:
            return 0
        left = -(-self.policy.keeps(held.computed) // self._blocks.size)
        return max(0, self._blocks.pool.own_among(held.blocks) - left)

    def missing(self, held: Held) -> int:
        """How many blocks more than are available it takes to compress what is ``held``; it lets go of its own."""
        pool, left = self._blocks.pool, self.policy.keeps(held.computed)
        return -(-left // self._blocks.size) - pool.available - pool.own_among(held.blocks)

    def compact(self, sequence: Sequence, held: Held) -> None:
        """What is left of what is ``held`` moves to fresh blocks, so that those that others hold, or the prefix tree
        knows, stay as they are."""
        left, before = self.policy.keeps(held.computed), held.blocks
        assert held.slot is not None
        # Released first, as there may be no others: a compaction reads all of its sources before it writes.
        self._blocks.release(before)
        held.blocks = []
        self._blocks.append(held, self._blocks.take(-(-left // self._blocks.size)))
        sources, targets = self._blocks.places(before, held.places), self._blocks.places(held.blocks, left)
        packed = self.packed(held)
        self.pending.append(Compaction(held.slot, held.computed, held.known, packed, sources, targets))
        held.dropped, held.compacted, held.known = held.computed - left, held.computed, left
        held.written = left
        self.schedule(sequence, held)
