"""The memory of sequences: who has a slot and which blocks, and nobody else changes them."""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from penstock.serve.engine.sequence import Sequence, common
from penstock.serve.kv.chunks import Chunks
from penstock.serve.kv.compaction import Compaction
from penstock.serve.kv.evictions.contract import Eviction
from penstock.serve.kv.evictions.lru import LeastRecentlyUsed
from penstock.serve.kv.policies.contract import CachePolicy
from penstock.serve.kv.policies.full import Full
from penstock.serve.kv.pool import ROOT, BlockPool, name_behind
from penstock.serve.kv.reuse.contract import Reuse
from penstock.serve.kv.reuse.prefix import PrefixReuse
from penstock.serve.kv.tiers import Tiers

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


class Prefix(NamedTuple):
    """What a sequence finds of its first tokens: the blocks, how many tokens were computed, and, where that cache was
    compressed, what :class:`Held` has of it, and what the sequence has of where."""

    blocks: list[int]
    computed: int
    dropped: int = 0
    compacted: int = 0
    known: int = 0
    compressed: tuple[int, ...] = ()


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

    Attributes:
        pool: the blocks.
        chunks: which contexts are cached by themselves.
        tables: int32 [slots, most blocks of a sequence], the blocks of each slot's sequence.
        running: sequences that have memory, by priority and arrival. Companions have some, and are not listed.
        kept: sequences that have ended and hold their blocks, but no slot, for others to go on from. Of these, the one
            that nobody went on from for the longest time lets go first where blocks are wanted.
        hits, misses: full blocks of the sequences that were let in, found in the cache and not.
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
    ) -> None:
        self.pool, self._policy = BlockPool(blocks, block_size, eviction.start), policy or Full()
        self._tentative = tentative
        self.tables = np.zeros((slots, -(-context // block_size)), np.int32)
        self.running: list[Sequence] = []
        self.kept: OrderedDict[Sequence, None] = OrderedDict()
        self._slots = list(range(slots - 1, -1, -1))
        self._copies: list[tuple[int, int]] = []
        self._compactions: list[Compaction] = []
        self.hits = self.misses = 0
        self._tiers, self.chunks = tiers, Chunks(self.pool, reuse, self._take, tiers)
        self._leaving: list[tuple[bytes, int]] = []
        self._restored: list[int] = []
        if tiers is not None:
            self.pool.on_evict = lambda block: self._leaving.append((self.pool.name(block), block))

    @property
    def free_slots(self) -> int:
        """How many more sequences could run."""
        return len(self._slots)

    # Coming and going

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot and the blocks that hold its prefix, if all of it would fit; its companions
        likewise. Tells whether it did."""
        members = sequence.members
        if self.free_slots < len(members):
            return False
        prefixes = [self._prefix(each) for each in members]
        # A block for each running sequence stays in hand, or the newcomer would soon be thrown out again.
        while (missing := self._needed(members, prefixes) + len(self.tables) - self.free_slots) > self.pool.available:
            if not self._let_go(missing):
                break
            prefixes = [self._prefix(each) for each in members]
        # So do blocks that contexts are taken from: else it would depend on others whether they are.
        missing += sum(self.chunks.room(each.chunks) for each in members)
        if missing > self.pool.available and self.running:
            return False
        for prefix in prefixes:
            self.pool.share(prefix.blocks)
        for member, prefix in zip(members, prefixes, strict=True):
            self._enter(member, prefix)
            self._restore(member)
            self._fill(member)
            found = member.computed // self.pool.block_size
            self.hits += found
            self.misses += len(member.tokens) // self.pool.block_size - found
        return True

    def fetch(self, sequence: Sequence) -> list[Future[bool]]:
        """Begins to read from disk what a waiting sequence begins with; it can be let in once all of it is done."""
        if self._tiers is None or not self._tiers.lasting:
            return []
        coming = []
        for member in sequence.members:
            found = self._match(member)
            coming += self._tiers.fetch(self._names(member, found[-1] if found else None, len(found)))
            coming += self.chunks.fetch(member.chunks)
        return coming

    def _fill(self, sequence: Sequence) -> None:
        """One who was let in takes what is cached of its contexts by themselves."""
        held, size = sequence.held, self.pool.block_size
        if not sequence.chunks or held is None:
            return
        fresh = -(-len(sequence.tokens) // size) - len(held.blocks)
        taken = self.chunks.find(sequence.chunks, held.computed, fresh)
        sequence.exact = min((each.chunk.start for each in taken if not each.whole), default=sequence.limit)
        if taken:
            blocks = self._take(fresh)
            self._append(held, blocks)
            self._restored += blocks  # some of their tokens nobody computes
            places = _places(held.blocks, len(sequence.tokens), size)
            filled = [each.chunk.start + each.places for each in taken]
            for each, own in zip(taken, filled, strict=True):
                self.chunks.move(each, places[own])
                held.renewed += 0 if each.whole else len(each.chunk.tokens) - len(own)
            held.filled = np.concatenate(filled)
            held.moved = len(held.filled)
            held.advance(0)

    def keep_chunks(self, sequence: Sequence) -> None:
        """The prompt of a running sequence is about to be computed to its end: its contexts are cached. Blocks are
        taken for them that nobody wants in this step."""
        held = sequence.held
        assert held is not None
        places = _places(held.blocks, sequence.prompt, self.pool.block_size)
        self.chunks.keep(sequence.chunks, places)

    def _restore(self, sequence: Sequence) -> None:
        """Brings back what one who was let in begins with, behind what the pool has of it."""
        held, size = sequence.held, self.pool.block_size
        assert held is not None
        if self._tiers is None or held.dropped or held.computed % size or held.committed < len(held.blocks):
            return
        last = held.blocks[-1] if held.blocks else None
        found = self._tiers.find(self._names(sequence, last, len(held.blocks)))
        blocks = self._take(min(len(found), self.pool.available))
        # What left the pool for these may have taken places of what was found.
        found = self._tiers.find(list(found)[: len(blocks)])
        if not self._busy().isdisjoint(blocks):
            found = {}
        self.pool.release(blocks[len(found) :])
        del blocks[len(found) :]
        if not blocks:
            return
        self._tiers.load(list(found.values()), blocks)
        self._restored += blocks
        self._append(held, blocks)
        held.computed = min(held.computed + len(blocks) * size, len(sequence.tokens))
        self._see(sequence, held)
        self.commit(sequence)

    def _names(self, sequence: Sequence, last: int | None, first: int) -> Iterator[bytes]:
        """Of the blocks that a sequence begins with, from the block number ``first`` on, which is behind the block
        ``last`` of the tree."""
        name = sequence.adapter.key if last is None else self.pool.name(last)
        for tokens in sequence.blocks(self.pool.block_size, self._reusable(sequence), first):
            name = name_behind(name, tokens)
            yield name

    def _prefix(self, sequence: Sequence) -> Prefix:
        """Blocks that hold the first tokens of a sequence that waits: those of where it goes on from, or those that the
        prefix tree knows."""
        found = self._match(sequence)
        origin = sequence.origin
        if origin is not None and origin in self.kept:  # one that runs may be about to write to what would be copied
            shared = self._shared(origin, sequence)
            if shared.computed > len(found) * self.pool.block_size:
                return shared
        return Prefix(found, min(len(found) * self.pool.block_size, len(sequence.tokens)))

    def _match(self, sequence: Sequence) -> list[int]:
        """The blocks that the prefix tree has of what a sequence begins with, and may take from there."""
        return self.pool.follow(sequence.blocks(self.pool.block_size, self._reusable(sequence)), self._root(sequence))

    def _root(self, sequence: Sequence) -> int:
        return self.pool.root(sequence.adapter.key)

    def _needed(self, members: List[Sequence], prefixes: List[Prefix]) -> int:
        """Blocks that ``members`` take beside those of their ``prefixes``, of which the last may have to be copied."""
        size = self.pool.block_size
        found = {block for prefix in prefixes for block in prefix.blocks}
        whole = sum(
            -(-(len(each.tokens) - prefix.dropped) // size) - (prefix.computed - prefix.dropped) // size
            for each, prefix in zip(members, prefixes, strict=True)
            if prefix.computed < len(each.tokens)
        )
        return whole + self.pool.idle_among(found)

    def _reusable(self, sequence: Sequence, dropped: int = 0, compacted: int = 0) -> int:
        """How many of the first tokens may be taken from the cache: not the last, whose scores are wanted, nor those
        after which a log-probability is, nor those whose queries will be asked for. Of a context, nothing is wanted."""
        if sequence.is_context:
            return len(sequence.tokens)
        most = min(len(sequence.tokens) - 1, sequence.exact)
        if sequence.rated is not None:
            most = min(most, sequence.rated_from - 1)
        return min(most, self._due(sequence, compacted, dropped) - max(1, self._policy.watches))

    def _due(self, sequence: Sequence, computed: int, dropped: int) -> int:
        """When a cache is compressed next, whoever else there is."""
        if self._policy.patient:
            return next((place for place in sequence.compressed if place > computed), NEVER)
        due = self._policy.due(sequence.prompt, computed, dropped)
        return NEVER if due is None else due

    def _schedule(self, sequence: Sequence, held: Held) -> None:
        """Says when what is ``held`` is compressed next. Where it was before, it may not be anywhere else."""
        held.due, held.ripe = self._due(sequence, held.compacted, held.dropped), NEVER
        if self._policy.patient and held.due == NEVER:
            ripe = self._policy.due(sequence.prompt, held.compacted, held.dropped)
            held.ripe = NEVER if ripe is None else max(ripe, held.seen)

    def _see(self, sequence: Sequence, held: Held) -> None:
        """What is ``held`` was computed by others: the slot has none of its queries, and it may be computed in the step
        that is being formed."""
        held.seen = held.computed + max(1, self._policy.watches) if held.computed else 0
        self._schedule(sequence, held)

    def fork(self, parent: Sequence, child: Sequence) -> bool:
        """Lets ``child``, whose tokens begin as the parent's do, run on the same blocks. Tells whether it could: only
        where the parent has blocks and there is a slot."""
        held = parent.held
        if held is None or not self._slots:
            return False
        prefix = self._shared(parent, child)
        self.pool.share(prefix.blocks)
        self._enter(child, prefix)
        self.commit(child)
        return True

    def _shared(self, parent: Sequence, child: Sequence) -> Prefix:
        """The blocks of ``parent`` that hold what ``child`` begins with too."""
        held = parent.held
        assert held is not None
        reusable = self._reusable(child, held.dropped, held.compacted)
        computed = max(0, min(held.computed, common(parent.tokens, child.tokens), reusable))
        compressed, own = (
            tuple(place for place in each.compressed if place <= held.compacted) for each in (parent, child)
        )
        other = child.preempted and own != compressed  # what it said was said behind another cache
        if held.dropped and (computed < held.compacted or parent.prompt != child.prompt or other):
            return Prefix([], 0)
        blocks = held.blocks[: -(-(computed - held.dropped) // self.pool.block_size)]
        return Prefix(blocks, computed, held.dropped, held.compacted, held.known, compressed)

    def _enter(self, sequence: Sequence, prefix: Prefix) -> None:
        """``sequence`` runs; its first tokens are in the blocks of ``prefix``."""
        blocks, computed, dropped, compacted, known, compressed = prefix
        held = sequence.held = Held(self._slots.pop(), [], computed, dropped, compacted, known)
        held.node = self._root(sequence)
        sequence.compressed[: len(compressed)] = compressed
        self._see(sequence, held)
        self._append(held, blocks)
        whole = 0 if dropped else computed // self.pool.block_size
        for index, block in enumerate(blocks[:whole]):
            if not self.pool.known(block):
                break
            held.committed, held.node = index + 1, self.pool.node_of(block)
        if sequence.leader is None:
            self.running.append(sequence)
            if len(self.running) > 1 and self.running[-2].rank > sequence.rank:
                self.running.sort(key=lambda each: each.rank)

    def release(self, sequence: Sequence) -> None:
        """Takes all memory of a running sequence and of its companions."""
        for member in sequence.members:
            held = member.held
            assert held is not None
            self._persist(held.blocks)
            self.pool.release(held.blocks)
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
            self._persist(sequence.held.blocks)
            self.pool.release(sequence.held.blocks)
            sequence.held = None

    def clear(self) -> list[Sequence]:
        """What the cache holds is void. Returns those that ran, which have no memory any more."""
        ran = list(self.running)
        for sequence in ran:
            self.release(sequence)
        for sequence in list(self.kept):
            self.forget(sequence)
        self.pool.forget()
        self.chunks.forget()
        for told in (self._copies, self._compactions, self._leaving, self._restored):
            told.clear()
        return ran

    def _let_go(self, wanted: int) -> bool:
        """Takes the blocks of one that was kept, where ``wanted`` blocks could become available so. Tells whether it
        did."""
        if self.pool.available + sum(len(each.held.blocks) for each in self.kept if each.held is not None) < wanted:
            return False
        if self.kept:
            self.forget(next(iter(self.kept)))
            return True
        return False

    def _take(self, count: int) -> list[int]:
        """Blocks of the pool; what has to leave for them is kept in the tiers."""
        taken = self.pool.take(count)
        if self._tiers is not None and self._leaving:
            self._tiers.keep(self._leaving)
            self._leaving = []
        return taken

    def _persist(self, blocks: List[int]) -> None:
        """Keeps ``blocks`` of one that lets go of them where they outlive the engine."""
        if self._tiers is not None and self._tiers.lasting:
            known = [block for block in reversed(blocks) if self.pool.known(block)]
            self._tiers.keep([(self.pool.name(block), block) for block in known])

    def _busy(self) -> set[int]:
        """Blocks that are read or written before the next step: what comes back at once must not get there."""
        places = [each for work in self._compactions for each in (work.sources, work.targets)]
        moved = np.unique(np.concatenate(places) // self.pool.block_size).tolist() if places else []
        return {*itertools.chain(*self._copies), *moved, *self.chunks.busy}

    def restored(self) -> list[int]:
        """Blocks that came back, or were filled from elsewhere, since they were told last."""
        told, self._restored = self._restored, []
        return told

    # Growing and shrinking

    def reserve(self, pieces: Iterable[tuple[Sequence, int]]) -> int:
        """Blocks for as many more tokens of each running sequence as the ``pieces`` say. Where the next token goes to a
        block that is not the sequence's alone, it gets a copy of that, see :meth:`copies`.

        Returns:
            0, or how many blocks more than are available it takes; then nothing was done.
        """
        growing = [(each.held, count) for each, count in pieces if each.held is not None]
        needs = self._needs(growing)
        while needs and (missing := sum([fresh + frozen for _, fresh, frozen in needs]) - self.pool.available) > 0:
            if not self._let_go(missing + self.pool.available):
                return missing
            needs = self._needs(growing)  # a block that was shared with one that let go may be a sequence's own now
        for held, fresh, frozen in needs:
            if frozen:
                self._own(held)
            if fresh:
                self._append(held, self._take(fresh))
        return 0

    def advance(self, sequence: Sequence, count: int) -> None:
        """``count`` more tokens of ``sequence`` are about to be computed."""
        held = sequence.held
        assert held is not None
        held.advance(count)
        if held.computed // self.pool.block_size > held.committed or not sequence.remaining:
            self.commit(sequence)

    def compact(self, sequence: Sequence) -> int:
        """Compresses the cache of a running sequence that is due: what is left moves to fresh blocks, so that those
        that others hold, or the prefix tree knows, stay as they are; see :meth:`compactions`.

        Returns:
            0, or how many blocks more than are available it takes; then nothing was done.
        """
        held, size = sequence.held, self.pool.block_size
        assert held is not None
        self.commit(sequence)
        left = self._policy.keeps(held.computed)
        missing = -(-left // size) - self.pool.available - self.pool.own_among(held.blocks)
        while missing > 0 and self.kept:
            self.forget(next(iter(self.kept)))
            missing = -(-left // size) - self.pool.available - self.pool.own_among(held.blocks)
        if missing > 0:
            return missing
        before = held.blocks
        assert held.slot is not None
        self._persist(before)
        self.pool.release(before)
        held.blocks = []
        self._append(held, self._take(-(-left // size)))
        sources, targets = (
            _places(blocks, count, size) for blocks, count in ((before, held.places), (held.blocks, left))
        )
        packed = self.packed(held)
        self._compactions.append(Compaction(held.slot, held.computed, held.known, packed, sources, targets))
        held.dropped, held.compacted, held.known = held.computed - left, held.computed, left
        self._schedule(sequence, held)
        held.committed, held.node = 0, self._root(sequence)
        return 0

    def gain(self, sequence: Sequence) -> int:
        """How many more blocks were available if the cache of a running sequence was compressed now: 0 where it may not
        be, such as while what it said already is computed again."""
        held = sequence.held
        if held is None or held.computed < held.ripe:
            return 0
        if sequence.remaining > 1 and len(sequence.tokens) > sequence.prompt:
            return 0
        left = -(-self._policy.keeps(held.computed) // self.pool.block_size)
        return max(0, self.pool.own_among(held.blocks) - left)

    def press(self, sequence: Sequence) -> None:
        """The cache of a running sequence is due: it is compressed before more of it is computed."""
        held = sequence.held
        assert held is not None
        sequence.compressed.append(held.computed)
        self._schedule(sequence, held)

    def packed(self, held: Held) -> int:
        """How many tokens share the first places of what is ``held``, see :meth:`CachePolicy.packed`."""
        return self._policy.packed(held.compacted) if held.dropped else 0

    def compactions(self) -> list[Compaction]:
        """What has to be compressed before anything else is done. It is told once."""
        told, self._compactions = self._compactions, []
        return told

    def copies(self) -> list[tuple[int, int]]:
        """Blocks (from, to) that have to be copied before anything else is computed. They are told once."""
        told, self._copies = self._copies, []
        return told

    def commit(self, sequence: Sequence) -> None:
        """Puts the full blocks of known tokens of ``sequence`` into the prefix tree, where they hold all of its
        tokens; of a whole context, which gains no tokens, all blocks."""
        held, size = sequence.held, self.pool.block_size
        assert held is not None
        if held.dropped:
            return
        known = min(held.computed, len(sequence.tokens), sequence.exact)
        if sequence.is_context and sequence.remaining:
            known -= known % size
        for tokens in sequence.blocks(size, known, held.committed):
            held.node = self.pool.commit(held.node, tokens, held.blocks[held.committed])
            held.committed += 1

    def catch_up(self, sequence: Sequence) -> None:
        """Before the contexts of a running sequence are computed further, they take from the prefix tree what has come
        there since they were let in; those of which nothing remains to be computed give their slots back."""
        size = self.pool.block_size
        for context in sequence.contexts:
            held = context.held
            assert held is not None
            if context.remaining and held.computed == len(held.blocks) * size:
                prefix = self._prefix(context)
                if prefix.computed > held.computed:
                    more = prefix.blocks[len(held.blocks) :]
                    self.pool.share(more)
                    self._append(held, more)
                    held.computed, held.committed = prefix.computed, len(held.blocks)
                    held.node = self.pool.node_of(held.blocks[-1])
            if not context.remaining and held.slot is not None:
                self._slots.append(held.slot)
                held.slot = None

    def beside(self, sequence: Sequence) -> np.ndarray:
        """The places in the memory of the contexts of a running sequence, int64."""
        size, found = self.pool.block_size, []
        for context in sequence.contexts:
            assert context.held is not None
            found.append(_places(context.held.blocks, len(context.tokens), size)[sequence.shared :])
        return np.concatenate(found)

    def truncate(self, sequence: Sequence, computed: int) -> None:
        """Cuts a running sequence back to its first ``computed`` tokens in the cache, or to what it has where that is
        less; to none where the cache was compressed since. Blocks behind that go back to the pool."""
        held, size = sequence.held, self.pool.block_size
        assert held is not None
        computed = min(computed, held.computed)
        if computed == held.computed and (held.filled.size or held.places > (len(held.blocks) - 1) * size):
            return
        # Queries of tokens that are cut off have taken the places of earlier ones.
        held.seen = max(held.seen, held.computed - self._tentative) if self._policy.watches else held.seen
        if held.dropped and computed < held.compacted:
            computed, held.dropped, held.compacted, held.known, held.seen = 0, 0, 0, 0, 0
        self._schedule(sequence, held)
        kept = -(-(computed - held.dropped) // size)
        self.pool.release(held.blocks[kept:])
        del held.blocks[kept:]
        held.computed = computed
        if held.committed > computed // size:
            # Where a twin of a block is in the tree, the block itself is not: the next commit finds the way anew.
            held.committed, held.node = 0, self._root(sequence)

    def renew(self, sequence: Sequence) -> None:
        """Makes those who keep something by slot look at ``sequence`` anew: its text was changed from outside."""
        assert sequence.held is not None
        sequence.held = dataclasses.replace(sequence.held, probed=0)

    def check(self) -> None:
        """Compares the pool's books with what sequences hold.

        Raises:
            InvariantError: they differ.
        """
        members = [*(member for sequence in self.running for member in sequence.members), *self.kept]
        self.pool.check([*(each.held.blocks for each in members if each.held is not None), *self.chunks.holding])

    def _needs(self, growing: list[tuple[Held, int]]) -> list[tuple[Held, int, bool]]:
        """Of those that need any for so many more tokens: how many fresh blocks, and whether the next token goes to a
        block that is not this sequence's alone, as it may after a fork."""
        size, needs = self.pool.block_size, []
        for held, count in growing:
            place, has = held.computed - held.dropped, len(held.blocks)
            fresh, first = -(-(place + count) // size) - has, place // size
            frozen = first < has and self.pool.frozen(held.blocks[first])
            if fresh > 0 or frozen:
                needs.append((held, max(fresh, 0), frozen))
        return needs

    def _own(self, held: Held) -> None:
        """A copy, for the sequence alone, of the block that its next token goes to."""
        first = held.places // self.pool.block_size
        (fresh,) = self._take(1)
        self._copies.append((held.blocks[first], fresh))
        self.pool.release([held.blocks[first]])
        held.blocks[first] = fresh
        assert held.slot is not None
        self.tables[held.slot, first] = fresh

    def _append(self, held: Held, blocks: List[int]) -> None:
        first = len(held.blocks)
        held.blocks += blocks
        assert held.slot is not None
        self.tables[held.slot, first : len(held.blocks)] = blocks


def _places(blocks: list[int], count: int, size: int) -> np.ndarray:
    """The places in the memory of the first ``count`` tokens in ``blocks``, int64."""
    return (np.array(blocks, np.int64)[:, None] * size + np.arange(size)).reshape(-1)[:count]
