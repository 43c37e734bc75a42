"""The memory of sequences: who has a slot and which blocks."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np

from penstock.ops.paged.residual import Residual
from penstock.serve.engine.memory.blocks import Blocks
from penstock.serve.engine.memory.compression import Compression
from penstock.serve.engine.memory.held import Held, Prefix
from penstock.serve.engine.memory.prefixes import Prefixes
from penstock.serve.engine.memory.returning import Returning
from penstock.serve.engine.sequence import Sequence
from penstock.serve.kv.compaction import Compaction
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.evictions.lru import LeastRecentlyUsed
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.kv.reuse.contract import Reuse
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.serve.kv.tiers import Tiers


class Memory:
    """Slots, tables and blocks of all running sequences.

    Args:
        slots: most sequences at a time.
        blocks: of the cache.
        block_size: tokens of a block.
        context: most tokens of a sequence.
        policy: what the cache of a sequence keeps.
        eviction: the order in which blocks that nobody holds go.
        tiers: where evicted blocks go, and come back from.
        reuse: how contexts of requests are encoded.
        tentative: most tokens of a sequence that one step may compute for nothing, since they were drafted.
        residual: the windows in full precision that sequences have.

    Attributes:
        pool: the blocks.
        chunks: which contexts are cached by themselves.
        tables: int32 [slots, most blocks of a sequence], the blocks of each slot's sequence.
        running: sequences that have memory, by priority and arrival. Companions have some, and are not listed.
        kept: sequences that have ended and hold their blocks, but no slot, for others to go on from. Of these, the one
            that nobody went on from for the longest time lets go first where blocks are wanted.
        hits, misses: full blocks of the sequences that were admitted, found in the cache and not.
    """

    def __init__(
        self,
        slots: int,
        blocks: int,
        block_size: int,
        context: int,
        policy: CachePolicy | None = None,
        eviction: Eviction = LeastRecentlyUsed(),
        tiers: Tiers | None = None,
        reuse: Reuse = PrefixReuse(),
        tentative: int = 0,
        residual: Residual | None = None,
    ) -> None:
        self._residual = residual
        self.running: list[Sequence] = []
        self.kept: OrderedDict[Sequence, None] = OrderedDict()
        self._slots = list(range(slots - 1, -1, -1))
        self.hits = self.misses = 0
        self._blocks = Blocks(slots, blocks, block_size, context, eviction, tiers)
        self._compression = Compression(policy or Full(), self._blocks, tentative)
        self._prefixes = Prefixes(self._blocks, self._compression, self.kept, residual)
        self._returning = Returning(self._blocks, self._prefixes, self._compression, reuse)
        self.pool, self.tables, self.chunks = self._blocks.pool, self._blocks.tables, self._returning.chunks

    @property
    def compresses(self) -> bool:
        """Whether caches of running sequences are ever compressed."""
        return self._compression.policy.compresses

    @property
    def free_slots(self) -> int:
        """How many more sequences could run."""
        return len(self._slots)

    # Coming and going

    def fetch(self, sequence: Sequence, seconds: float) -> list[Future[bool]]:
        """Begins to read from disk what a waiting sequence begins with; it can be admitted once all of it is done. What
        is sooner computed, at so many ``seconds`` for a token, is left there."""
        return self._returning.fetch(sequence, seconds)

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot and the blocks that hold its prefix, if all of it would fit; its companions
        likewise. Tells whether it did."""
        members = sequence.members
        if self.free_slots < len(members):
            return False
        prefixes = [self._prefixes.find(each) for each in members]
        # A block for each running sequence stays in hand, or the newcomer would soon be preempted again.
        hand = len(self.tables) - self.free_slots
        while (missing := self._prefixes.needed(members, prefixes) + hand) > self.pool.available:
            if not self._let_go(missing):
                break
            prefixes = [self._prefixes.find(each) for each in members]
        # So do blocks that contexts are taken from: else it would depend on others whether they are.
        missing += sum(self.chunks.room(each.chunks) for each in members)
        if missing > self.pool.available and self.running:
            return False
        # All before anything is taken: what the first takes might else evict what the next has found.
        for prefix in prefixes:
            self.pool.share(prefix.blocks)
        for member, prefix in zip(members, prefixes, strict=True):
            self._enter(member, prefix)
            self._returning.restore(member)
            self._returning.fill(member)
            self._go_back(member)
            found = member.computed // self.pool.block_size
            self.hits += found
            self.misses += len(member.tokens) // self.pool.block_size - found
        return True

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Lets ``child``, whose tokens begin as the parent's do, run on the same blocks. Tells whether it could: only
        where the parent has blocks and there is a slot."""
        if parent.held is None or not self._slots:
            return False
        prefix = self._prefixes.shared(parent, child)
        self.pool.share(prefix.blocks)
        self._enter(child, prefix)
        self._go_back(child)
        self.commit(child)
        return True

    def _enter(self, sequence: Sequence, prefix: Prefix) -> None:
        """``sequence`` runs; its first tokens are in the blocks of ``prefix``."""
        blocks, computed, dropped, compacted, known, compressed = prefix
        held = sequence.held = Held(self._slots.pop(), [], computed, dropped, compacted, known)
        held.node = self._prefixes.root(sequence)
        sequence.compressed[: len(compressed)] = compressed
        self._compression.see(sequence, held)
        self._blocks.append(held, blocks)
        # Blocks of a compressed cache are never in the tree, which knows whole texts only.
        whole = 0 if dropped else computed // self.pool.block_size
        for index, block in enumerate(blocks[:whole]):
            if not self.pool.known(block):
                break
            held.committed, held.node = index + 1, self.pool.node_of(block)
        if sequence.leader is None:
            self.running.append(sequence)
            if len(self.running) > 1 and self.running[-2].rank > sequence.rank:
                self.running.sort(key=lambda each: each.rank)

    def _go_back(self, sequence: Sequence) -> None:
        """What a sequence begins with was computed by others, whose windows it has not: it goes on from where it sees
        none of them."""
        held = sequence.held
        assert held is not None
        if self._residual is not None:
            self.truncate(sequence, self._residual.begin(held.places, held.since) + held.dropped)

    def release(self, sequence: Sequence) -> None:
        """Takes all memory of a running sequence and of its companions."""
        for member in sequence.members:
            held = member.held
            assert held is not None
            self._blocks.release(held.blocks)
            if held.slot is not None:
                self._slots.append(held.slot)
            member.held = None
        self.running.remove(sequence)

    def keep(self, sequence: Sequence) -> None:
        """A running sequence that ends gives its slot back, but not its blocks."""
        assert sequence.held is not None and sequence.held.slot is not None and not sequence.companions
        self._slots.append(sequence.held.slot)
        self.running.remove(sequence)
        self.kept[sequence] = None

    def forget(self, sequence: Sequence) -> None:
        """Takes the blocks of one that was kept, if it has them still."""
        if sequence in self.kept:
            assert sequence.held is not None
            del self.kept[sequence]
            self._blocks.release(sequence.held.blocks)
            sequence.held = None

    def clear(self) -> None:
        """What the cache holds is void: nobody has any memory any more."""
        for sequence in list(self.running):
            self.release(sequence)
        for sequence in list(self.kept):
            self.forget(sequence)
        self._blocks.forget()
        self._returning.forget()
        self._compression.pending.clear()

    def _let_go(self, wanted: int) -> bool:
        """Takes the blocks of one that was kept, where ``wanted`` blocks could become available so. Tells whether it
        did."""
        if self.pool.available + sum(len(each.held.blocks) for each in self.kept if each.held is not None) < wanted:
            return False
        if self.kept:
            self.forget(next(iter(self.kept)))
            return True
        return False

    # Growing and shrinking

    def reserve(self, pieces: Iterable[tuple[Sequence, int]]) -> int:
        """Blocks for as many more tokens of each running sequence as the ``pieces`` say. Where the next token goes to a
        block that is not the sequence's alone, it gets a copy of that, see :meth:`copies`.

        Returns:
            0, or how many blocks more than are available it takes; then nothing was done.
        """
        growing = [(each.held, count) for each, count in pieces if each.held is not None]
        needs = self._blocks.needs(growing)
        while needs and (missing := sum([fresh + frozen for _, fresh, frozen in needs]) - self.pool.available) > 0:
            if not self._let_go(missing + self.pool.available):
                return missing
            needs = self._blocks.needs(growing)  # a block that was shared with one that let go may be one's own now
        for held, fresh, frozen in needs:
            if frozen:
                self._blocks.own(held)
            if fresh:
                self._blocks.append(held, self._blocks.take(fresh))
        return 0

    def has_place(self, held: Held) -> bool:
        """Whether the place of the next token is in a block that is the sequence's alone already."""
        block = held.places // self._blocks.size
        return block < len(held.blocks) and not self.pool.frozen(held.blocks[block])

    def step(self, sequence: Sequence, held: Held, count: int) -> None:
        """:meth:`advance` of a sequence that decodes, in whose cache no blocks come behind these tokens."""
        held.computed += count
        if held.computed // self._blocks.size > held.committed:
            self.commit(sequence)

    def advance(self, sequence: Sequence, count: int) -> None:
        """``count`` more tokens of ``sequence`` are about to be computed."""
        held = sequence.held
        assert held is not None
        held.advance(count)
        if held.computed // self.pool.block_size > held.committed or not sequence.remaining:
            self.commit(sequence)

    def commit(self, sequence: Sequence) -> None:
        """Puts the full blocks of known tokens of ``sequence`` into the prefix tree."""
        self._prefixes.commit(sequence)

    def truncate(self, sequence: Sequence, computed: int) -> None:
        """Cuts a running sequence back to its first ``computed`` tokens in the cache, or to what it has where that is
        less; to none where the cache was compressed since. Blocks behind that go back to the pool."""
        held, size = sequence.held, self.pool.block_size
        assert held is not None
        computed = min(computed, held.computed)
        if computed == held.computed and (held.filled.size or held.places > (len(held.blocks) - 1) * size):
            return
        computed = self._compression.cut(sequence, held, self._seen_whole(held, computed))
        kept = -(-(computed - held.dropped) // size)
        self.pool.release(held.blocks[kept:])
        del held.blocks[kept:]
        held.computed = computed
        if held.committed > computed // size:
            # Where a twin of a block is in the tree, the block itself is not: the next commit finds the way anew.
            held.committed, held.node = 0, self._prefixes.root(sequence)

    def _seen_whole(self, held: Held, computed: int) -> int:
        """To how many tokens what is ``held`` may be cut back where it is to be no more than ``computed``: where the
        window that the next token sees was overwritten, to what is before it."""
        if self._residual is None:
            return computed
        held.written = max(held.written, held.places)
        begin = self._residual.begin(computed - held.dropped, held.since)
        return min(computed, begin + held.dropped) if held.written - begin > self._residual.places else computed

    def renew(self, sequence: Sequence) -> None:
        """Makes those who keep something by slot look at ``sequence`` anew: its text was changed from outside."""
        assert sequence.held is not None
        sequence.held = dataclasses.replace(sequence.held, probed=0)

    # Compressing

    def compact(self, sequence: Sequence) -> int:
        """Compresses the cache of a running sequence that is due, see :meth:`compactions`.

        Returns:
            0, or how many blocks more than are available it takes; then nothing was done.
        """
        held = sequence.held
        assert held is not None
        self.commit(sequence)
        while (missing := self._compression.missing(held)) > 0:
            if not self.kept:
                return missing
            self.forget(next(iter(self.kept)))
        self._compression.compact(sequence, held)
        held.committed, held.node = 0, self._prefixes.root(sequence)
        return 0

    def gain(self, sequence: Sequence) -> int:
        """How many more blocks were available if the cache of a running sequence was compressed now; 0 where it may not
        be."""
        return self._compression.gain(sequence)

    def press(self, sequence: Sequence) -> None:
        """The cache of a running sequence is due: it is compressed before more of it is computed."""
        self._compression.press(sequence)

    def packed(self, held: Held) -> int:
        """How many tokens share the first places of what is ``held``, see :meth:`CachePolicy.packed`."""
        return self._compression.packed(held)

    # Contexts

    def catch_up(self, sequence: Sequence) -> None:
        """Before the contexts of a running sequence are computed further, they take from the prefix tree what has come
        there since they were admitted; those of which nothing remains to be computed give their slots back."""
        for context in sequence.contexts:
            self._prefixes.catch_up(context)
            held = context.held
            assert held is not None
            if not context.remaining and held.slot is not None:
                self._slots.append(held.slot)
                held.slot = None

    def beside(self, sequence: Sequence) -> np.ndarray:
        """The places in the memory of the contexts of a running sequence, int64."""
        found = []
        for context in sequence.contexts:
            assert context.held is not None
            found.append(self._blocks.places(context.held.blocks, len(context.tokens))[sequence.shared :])
        return np.concatenate(found)

    def keep_chunks(self, sequence: Sequence) -> None:
        """The prompt of a running sequence is about to be computed to its end: its contexts are cached."""
        self._returning.keep(sequence)

    # What the next step does first

    def copies(self) -> list[tuple[int, int]]:
        """Blocks (from, to) that have to be copied before anything else is computed. They are told once."""
        told, self._blocks.copies = self._blocks.copies, []
        return told

    def compactions(self) -> list[Compaction]:
        """What has to be compressed before anything else is done. It is told once."""
        told, self._compression.pending = self._compression.pending, []
        return told

    def restored(self) -> list[int]:
        """Blocks that came back, or were filled from elsewhere, since they were told last."""
        told, self._returning.restored = self._returning.restored, []
        return told

    def check(self) -> None:
        """Compares the pool's books with what sequences hold.

        Raises:
            InvariantError: they differ.
        """
        members = [*(member for sequence in self.running for member in sequence.members), *self.kept]
        self.pool.check([*(each.held.blocks for each in members if each.held is not None), *self.chunks.holding])
