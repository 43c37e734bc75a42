"""The books of one step while its batch is formed."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import TYPE_CHECKING

from penstock.serve.engine.batch import Entry
from penstock.serve.engine.sequence import Sequence

if TYPE_CHECKING:
    from penstock.serve.engine.engine import Engine


class StepRoom:
    """Room for one step of ``engine``; see :class:`~penstock.serve.batching.contract.Room`.

    Attributes:
        tokens: of the budget, left.
        entries: what was taken.
        copies: blocks (from, to) to be copied before the step, since a sequence writes to a frozen one.
        parts: how many entries each part has, in order; empty where nothing was split.
        lead: the part that goes first.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._pool = engine, engine.pool
        self.tokens = engine.limits.tokens
        self.entries: list[Entry] = []
        self.copies: list[tuple[int, int]] = []
        self.parts: tuple[int, ...] = ()
        self.lead = 0
        #: Of each call of take: where its entries begin and end, and whether it let a sequence in.
        self._takes: list[tuple[int, int, bool]] = []
        self._taken: set[int] = set()
        self._preempted = False

    def take(self, sequence: Sequence, most: int | None = None) -> int:
        if id(sequence) in self._taken or self.tokens == 0:
            return 0
        begin, waited = len(self.entries), not sequence.running
        budget = self.tokens if most is None else min(most, self.tokens)
        if waited and (self._preempted or budget < len(sequence.members) or not self._admit(sequence)):
            return 0
        shares = _shares(sequence, budget)
        if not any(shares) or not self._reserve(sequence, shares):
            return 0
        scored = int(shares[0] == sequence.remaining)
        for member, count in zip(sequence.members, shares, strict=True):
            if count:
                self._enter(member, count, scored)
        self._taken.add(id(sequence))
        self._takes.append((begin, len(self.entries), waited))
        return sum(shares)

    def _enter(self, sequence: Sequence, count: int, scored: int) -> None:
        last = min(sequence.computed + count, sequence.prompt - 1)
        rated = max(0, last - sequence.computed) if sequence.rated is not None else 0
        self.entries.append(Entry(sequence, sequence.slot, sequence.computed, count, scored, rated))
        self.tokens -= count
        sequence.computed += count
        sequence.in_flight += scored
        self._engine.commit(sequence)

    def split(self, *counts: int, lead: int = 0) -> None:
        if min(counts, default=0) < 1 or sum(counts) != len(self.entries) or not 0 <= lead < len(counts):
            raise ValueError(f"{counts} entries, part {lead} first, are no split of {len(self.entries)} entries")
        cuts = self._cuts()
        ends = sorted({cuts[bisect_left(cuts, end)] for end in itertools.accumulate(counts)})
        self.parts = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
        self.lead = min(lead, len(self.parts) - 1)

    def _cuts(self) -> list[int]:
        """Where the entries can be cut apart: between calls of :meth:`take`, except where a sequence that was let in
        found blocks in the prefix tree which an earlier entry only now computes."""
        size = self._pool.block_size
        writers = {
            block: index
            for index, entry in enumerate(self.entries)
            for block in entry.sequence.blocks[entry.start // size : (entry.start + entry.count) // size]
        }
        cuts: list[int] = []
        first = len(self.entries)  # that a later entry belongs to
        for begin, end, waited in reversed(self._takes):
            if end <= first:
                cuts.append(end)
            for entry in self.entries[begin:end] if waited else ():
                found = entry.sequence.blocks[: entry.start // size]
                first = min([first, *(writers[block] for block in found if block in writers)])
        return cuts[::-1]

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot and the blocks that hold its prefix, if all of it would fit; its companion
        likewise."""
        pool, members, slots = self._pool, sequence.members, self._engine.free_slots
        if slots < len(members):
            return False
        # Where the prompt is to be rated, all of it has to be computed.
        prefixes = [pool.match(each.tokens, len(each.tokens) - 1 if each.rated is None else 0) for each in members]
        found = {block for prefix in prefixes for block in prefix}
        needed = sum(-(-len(each.tokens) // pool.block_size) for each in members)
        needed += pool.idle_among(found) - sum(map(len, prefixes))
        # A block for each running sequence stays in hand, or the newcomer would soon be thrown out again.
        if needed + self._engine.limits.sequences - slots > pool.available and self._engine.running:
            return False
        for member, prefix in zip(members, prefixes, strict=True):
            pool.share(prefix)
            member.computed = len(prefix) * pool.block_size
            member.committed = len(prefix)
            member.node = pool.node_of(prefix[-1] if prefix else None)
            self._engine.start(member, prefix)
        if sequence.cached < 0:
            sequence.cached = sequence.computed
            self._engine.cached_tokens += sequence.cached
        return True

    def _reserve(self, sequence: Sequence, shares: list[int]) -> bool:
        """Blocks for as many more tokens of a running sequence and its companion as ``shares`` says, at others' expense
        where there are none."""
        pool, size = self._pool, self._pool.block_size
        pieces = [(each, count) for each, count in zip(sequence.members, shares, strict=True) if count]
        missing = [-(-(each.computed + count) // size) - len(each.blocks) for each, count in pieces]
        while sum(missing) + sum(self._shared(each) for each, _ in pieces) > pool.available:
            victim = next(s for s in reversed(self._engine.running) if id(s) not in self._taken)
            self._engine.preempt(victim)
            self._preempted = True
            if victim is sequence:
                return False
        for (each, _), blocks in zip(pieces, missing, strict=True):
            if self._shared(each):
                self._copy(each)
            if blocks > 0:
                self._engine.grow(each, pool.take(blocks))
        return True

    def _shared(self, sequence: Sequence) -> bool:
        """Whether the next token goes to a block that is not this sequence's alone, as it may after a fork."""
        first = sequence.computed // self._pool.block_size
        return first < len(sequence.blocks) and self._pool.frozen(sequence.blocks[first])

    def _copy(self, sequence: Sequence) -> None:
        """Gives ``sequence`` a copy of the block that its next token goes to."""
        pool, first = self._pool, sequence.computed // self._pool.block_size
        (fresh,) = pool.take(1)
        self.copies.append((sequence.blocks[first], fresh))
        pool.release([sequence.blocks[first]])
        sequence.blocks[first] = fresh
        self._engine.runner.tables[sequence.slot, first] = fresh


def _shares(sequence: Sequence, budget: int) -> list[int]:
    """How many of ``budget`` tokens go to ``sequence`` and to its companion. The last tokens of both are computed in
    the same step."""
    wanted = [member.remaining for member in sequence.members]
    if sum(wanted) <= budget:
        return wanted
    shares = []
    for count in wanted:
        shares.append(min(count - 1, budget))
        budget -= shares[-1]
    return shares
