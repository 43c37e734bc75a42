"""The books of one step while its batch is formed."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as List

import numpy as np

from penstock.core.events import Detail, EventLog
from penstock.serve.engine.batch import Beside, Entry
from penstock.serve.engine.memory.held import NEVER, Held
from penstock.serve.engine.memory.memory import Memory
from penstock.serve.engine.sequence import Sequence
from penstock.speculate.contract import AWAITED, Branching, Draft, Probing, Shaper
from penstock.speculate.tree import Tree, chain, path, pruned

NOTHING = Tree([], [])


class StepRoom:
    """Room for one step; see :class:`~penstock.serve.batching.contract.Room`.

    Args:
        memory: of the engine.
        tokens: the budget of the step.
        events: told who is admitted and who is preempted.
        ahead: how many tokens may be drafted for a sequence, on each way of a tree.
        branches: how many drafts a place of them has, by depth.
        shaper: of the trees of those that draft by probes, if any does.

    Attributes:
        tokens: of the budget, left.
        entries: what was taken.
        parts: how many entries each part has, in order; empty where nothing was split.
        lead: the part that goes first.
        preempted: sequences that lost their memory to those that were taken.
        found: prompt tokens that those who were admitted found in the cache.
        dropped: tokens that went out of caches that were compressed.
        reused: tokens of contexts that those who were admitted found in the cache by themselves.
        renewed: tokens of such contexts that are computed again.
    """

    def __init__(
        self,
        memory: Memory,
        tokens: int,
        events: EventLog,
        ahead: int = 0,
        branches: List[int] = (),
        shaper: Shaper | None = None,
    ) -> None:
        self._memory, self._events, self._ahead, self._branches = memory, events, ahead, branches
        self._shaper = shaper
        self.tokens = tokens
        self.entries: list[Entry] = []
        self.parts: tuple[int, ...] = ()
        self.lead = 0
        self.preempted: list[Sequence] = []
        self.found = self.dropped = self.reused = self.renewed = 0
        #: Of each call of take: where its entries begin and end, and whether the sequence may have found something in
        #: the prefix tree, since it was admitted or has contexts.
        self._takes: list[tuple[int, int, bool]] = []
        self._taken: set[int] = set()
        #: Members of running sequences that have not been taken yet, counted for the first that drafts.
        self._untaken: int | None = None
        self._pressed = False

    def compact(self, sequences: Iterable[Sequence]) -> None:
        """Compresses the caches of those of ``sequences`` that are due, before anything is taken. Where caches are
        never compressed, nobody is asked."""
        if not self._memory.compresses:
            return
        for sequence in list(sequences):
            for member in sequence.members:
                held = member.held
                if held is not None and held.computed >= held.due and not sequence.guessed:
                    self._compact(sequence, member)

    def _compact(self, sequence: Sequence, member: Sequence, why: Detail | None = None) -> None:
        held = member.held
        assert held is not None
        before = held.places
        while (missing := self._memory.compact(member)) > 0:
            if self._press(sequence, missing):
                continue
            victim = self._memory.running[-1]
            self._preempt(victim, sequence, missing)
            if victim is sequence:
                return
        self.dropped += before - held.places
        told: Detail = {"tokens": before, "kept": held.places, **(why or {})}
        self._events.add("compressed", sequence.request.id, sequence.index, **told)

    def _growing(self) -> Iterator[tuple[Sequence, Sequence]]:
        """Running sequences, each with one of its members whose cache was let grow and gives blocks up if it is
        compressed: the last by priority and arrival first, who would be preempted first."""
        for sequence in reversed(self._memory.running):
            if not sequence.guessed and sequence.length < sequence.limit:
                for member in sequence.members:
                    if self._memory.gain(member):
                        yield sequence, member

    def _press(self, winner: Sequence, missing: int) -> bool:
        """Compresses a cache of one who has not been taken yet, since ``winner`` misses so many blocks. Tells whether
        there was one."""
        for sequence, member in self._growing():
            if id(sequence) not in self._taken:
                self._memory.press(member)
                by: Detail = {"by": winner.request.id, "by_index": winner.index, "missing": missing}
                self._compact(sequence, member, by)
                return True
        return False

    def _wait(self) -> bool:
        """Whether there will be blocks in the next step, before which a cache of one who was taken is compressed."""
        for _, member in () if self._pressed else self._growing():
            self._memory.press(member)
            self._pressed = True
            break
        return self._pressed

    def take(self, sequence: Sequence, most: int | None = None) -> int:
        if id(sequence) in self._taken or self.tokens == 0 or not sequence.ready(self._ahead):
            return 0
        budget = self.tokens if most is None else min(most, self.tokens)
        if budget and (rows := self._step(sequence, budget)):
            return rows
        begin, waited = len(self.entries), not sequence.running
        again = 0 if sequence.sampling.again is None else sequence.sampling.again.more
        if waited and (self.preempted or budget < len(sequence.members) + again or not self._admit(sequence)):
            return 0
        shares = self._shares_beside(sequence, budget) if sequence.contexts else _shares(sequence, budget, again)
        if not any(shares) or not self._reserve(sequence, shares):
            return 0
        scored = int(shares[0] == sequence.remaining)
        drafts = scored and self._ahead and sequence.draft is not None
        window = self._window(sequence, budget - shares[0]) if drafts else NOTHING
        for member, count in zip(sequence.members, shares, strict=True):
            if count:
                self._enter(member, count, scored, window, again * scored)
        self._taken.add(id(sequence))
        self._count(-len(sequence.members))
        self._takes.append((begin, len(self.entries), waited or bool(sequence.contexts)))
        return sum(shares) + window.rows + again * scored

    def _step(self, sequence: Sequence, budget: int) -> int:
        """Takes the newest token of a running sequence, and what is drafted behind it, where nothing else is to be done
        for it, as it is for most sequences at most steps: what :meth:`take` does, the short way. Tells of how many rows
        of the ``budget``; 0 where it did not."""
        held = sequence.held
        if held is None or not sequence.alone:
            return 0
        start = held.computed
        if (
            sequence.length != start + 1
            or start >= held.due
            or held.filled.size
            or sequence.prompt_logprobs is not None
            or not self._memory.has_place(held)
        ):
            return 0
        assert held.slot is not None
        window = self._window(sequence, budget - 1) if self._ahead and sequence.draft is not None else NOTHING
        self._takes.append((len(self.entries), len(self.entries) + 1, False))
        count = 1 + len(window.tokens)
        if window is NOTHING:
            packed, since = (self._memory.packed(held), held.since) if held.dropped else (0, 0)
            self.entries.append(
                Entry(sequence, held.slot, start, 1, 1, dropped=held.dropped, packed=packed, since=since)
            )
        else:
            self._append(sequence, held, start, count, count, window)
        self._memory.step(sequence, held, count)
        rows = count + sum(window.probes)
        self.tokens -= rows
        sequence.in_flight += 1
        self._taken.add(id(sequence))
        self._count(-1)
        return rows

    def _admit(self, sequence: Sequence) -> bool:
        if not self._memory.admit(sequence):
            return False
        self._count(len(sequence.members))
        held = sequence.held
        assert held is not None
        beside = sum(max(0, context.computed - sequence.shared) for context in sequence.contexts)
        cached = held.computed + len(held.filled) + beside
        others = sequence.request.length - len(sequence.request.prompt)  # of its contexts
        detail = {"cached": cached, "tokens": len(sequence.tokens) + others}
        if sequence.cached < 0:
            sequence.cached = cached
            self.found += cached
            self.reused += beside + held.moved
            self.renewed += held.renewed
        self._events.add("admitted", sequence.request.id, sequence.index, **detail)
        return True

    def _enter(self, sequence: Sequence, count: int, scored: int, window: Tree, again: int) -> None:
        held, drafted = sequence.held, len(window.tokens)
        assert held is not None and held.slot is not None
        count, scored = count + drafted, scored + drafted
        *others, (start, last) = held.runs(count)
        for begin, length in others:
            self._append(sequence, held, begin, length)
        self._append(sequence, held, start, last, scored, window, again)
        self.tokens -= count + sum(window.probes) + again
        sequence.in_flight += bool(scored)
        self._memory.advance(sequence, count)

    def _append(
        self,
        sequence: Sequence,
        held: Held,
        start: int,
        count: int,
        scored: int = 0,
        window: Tree = NOTHING,
        again: int = 0,
    ) -> None:
        """Takes ``count`` tokens of a running sequence in a row, from ``start`` on."""
        first, prompt_logprobs, end = start, 0, start + count
        if sequence.prompt_logprobs is not None:
            first = max(start, sequence.prompt_logprobs_from - 1)
            prompt_logprobs = max(0, min(end, len(sequence.request.prompt) - 1) - first)
        parents = tuple(window.parents) if window.tokens and window.branched else ()
        sees = sequence.contexts and end > sequence.shared
        assert held.slot is not None
        self.entries.append(
            Entry(
                *(sequence, held.slot, start, count, scored, prompt_logprobs, first - start),
                *(tuple(window.tokens), held.dropped, self._memory.packed(held), parents, again),
                self._beside(sequence) if sees else None,
                tuple(each for each in sequence.chunks if each.asks(start, end)) if sequence.chunks else (),
                tuple(window.probes) if any(window.probes) else (),
                held.since,
            )
        )

    def _shares_beside(self, sequence: Sequence, budget: int) -> list[int]:
        """How many of ``budget`` tokens go to ``sequence`` and to its contexts: first what they all begin with, which
        the contexts then find in the cache; what sees the contexts, once these are there."""
        self._memory.catch_up(sequence)
        size = self._memory.pool.block_size
        first = sequence.remaining if sequence.informed else max(0, sequence.shared - sequence.computed)
        shares, waits = [min(first, budget)], sequence.computed < sequence.shared // size * size
        for context in sequence.contexts:
            shares.append(0 if waits else min(context.remaining, budget - sum(shares)))
        return shares

    def _beside(self, sequence: Sequence) -> Beside:
        assert sequence.weighing is not None
        return Beside(sequence.shared, sequence.shift, self._memory.beside(sequence), sequence.weighing)

    def _window(self, sequence: Sequence, budget: int) -> Tree:
        """Tentative tokens behind the last one of a running sequence, where neither budget nor blocks are wanted for
        those that run and have not been taken yet."""
        assert sequence.draft is not None and sequence.held is not None
        held, size = sequence.held, self._memory.pool.block_size
        # Drafts may be for nothing: a token and a block stay for each that runs and would get none, this one left out.
        others = self._left() - 1
        blocks = min(len(held.blocks) + max(0, self._memory.pool.available - others), self._memory.tables.shape[1])
        fit = blocks * size - len(sequence.tokens) + held.dropped
        due = held.due - held.computed - sequence.remaining
        most = min(budget - others, fit, due)
        left = sequence.limit - len(sequence.tokens) - 1
        if min(most, self._ahead, left) < 1:
            return NOTHING
        sequence.catch_up()
        if self._shaper is not None and isinstance(sequence.draft, Probing):
            window = sequence.draft.shape(self._shaper, held.probed, left, most)
        else:
            window = self._drafted(sequence, sequence.draft, min(self._ahead, left), most)
        if window.rows:
            sequence.guessed = True
            self._memory.reserve([(sequence, sequence.remaining + window.rows)])
        return window

    def _left(self) -> int:
        """Members of running sequences that have not been taken yet."""
        if self._untaken is None:
            self._untaken = sum(len(each.members) for each in self._memory.running if id(each) not in self._taken)
        return self._untaken

    def _count(self, more: int) -> None:
        """There are so many ``more`` of them."""
        if self._untaken is not None:
            self._untaken += more

    def _drafted(self, sequence: Sequence, draft: Draft, ahead: int, most: int) -> Tree:
        """What ``draft`` says of up to ``ahead`` tokens on each way and ``most`` in all, as far as a grammar allows
        it."""
        if self._branches and isinstance(draft, Branching):
            window = draft.grow(self._branches, ahead, most)
        else:
            window = chain(draft.propose(min(ahead, most))[: min(ahead, most)])
        if sequence.matcher is None or window.tokens[:1] == [AWAITED]:
            return window
        kept: set[int] = set()
        for end in set(range(len(window.tokens))).difference(window.parents):
            way = path(window.parents, end)
            kept.update(way[: sequence.matcher.allowed([window.tokens[node] for node in way])])
        return pruned(window, kept)

    def _reserve(self, sequence: Sequence, shares: list[int]) -> bool:
        """Blocks for as many more tokens of a running sequence and its companions as ``shares`` says, at others'
        expense where there are none: caches that may be are compressed before anybody is preempted."""
        pieces = [(each, count) for each, count in zip(sequence.members, shares, strict=True) if count]
        while (missing := self._memory.reserve(pieces)) > 0:
            # By what it costs: compressing loses tokens of a cache, waiting a step; one that is preempted computes its
            # whole text again. There is always a victim: this sequence runs, too, and yields where nobody is behind it.
            if self._press(sequence, missing):
                continue
            if self._wait():
                return False
            victim = next(each for each in reversed(self._memory.running) if id(each) not in self._taken)
            self._preempt(victim, sequence, missing)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence, winner: Sequence, missing: int) -> None:
        """Takes the memory of ``victim``, which will be computed again, since ``winner`` misses so many blocks."""
        computed = victim.computed
        self._memory.release(victim)
        self._count(-len(victim.members))
        victim.preempted = True
        self.preempted.append(victim)
        detail: Detail = {"by": winner.request.id, "by_index": winner.index, "missing": missing, "computed": computed}
        self._events.add("preempted", victim.request.id, victim.index, **detail, taken=len(self.entries))

    def split(self, *counts: int, lead: int = 0) -> None:
        if min(counts, default=0) < 1 or sum(counts) != len(self.entries) or not 0 <= lead < len(counts):
            raise ValueError(f"{counts} entries, part {lead} first, are no split of {len(self.entries)} entries")
        cuts = self._cuts()
        ends = sorted({cuts[bisect_left(cuts, end)] for end in itertools.accumulate(counts)})
        self.parts = tuple(end - begin for begin, end in itertools.pairwise([0, *ends]))
        self.lead = min(lead, len(self.parts) - 1)

    def _cuts(self) -> list[int]:
        """Where the entries can be cut apart: between calls of :meth:`take`, except where a sequence found blocks in
        the prefix tree which an earlier entry only now computes."""
        size = self._memory.pool.block_size
        # The tree offers a block as soon as its tokens are planned, and parts are computed beside each other: who reads
        # a block and the entry that writes it have to be in one part.
        writers = {
            block: index
            for index, entry in enumerate(self.entries)
            for block in _blocks(entry)[_first(entry) // size : -(-(_first(entry) + entry.count) // size)]
        }
        cuts: list[int] = []
        first = len(self.entries)  # that a later entry belongs to
        for begin, end, waited in reversed(self._takes):
            if end <= first:
                cuts.append(end)
            # All blocks of the others are of earlier steps, or their own.
            for entry in self.entries[begin:end] if waited else ():
                found = _blocks(entry)[: _first(entry) // size]
                if entry.beside is not None:
                    found = found + np.unique(entry.beside.slots // size).tolist()
                first = min([first, *(writers[block] for block in found if block in writers)])
        return cuts[::-1]


def _blocks(entry: Entry) -> list[int]:
    assert entry.sequence.held is not None
    return entry.sequence.held.blocks


def _first(entry: Entry) -> int:
    """The place in the cache of its first token."""
    return entry.start - entry.dropped


def _shares(sequence: Sequence, budget: int, again: int) -> list[int]:
    """How many of ``budget`` tokens go to ``sequence`` and to its companions: none beyond where its cache is to be
    compressed. The last tokens of all are computed in the same step, ``again`` times more with other experts."""
    shares, left = [], budget - again
    for member in sequence.members:
        wanted, held = member.remaining, member.held
        most = left if held is None else min(left, held.due - held.computed)
        if wanted > most:
            return _pieces(sequence, budget)
        shares.append(wanted)
        left -= wanted
    return shares


def _pieces(sequence: Sequence, budget: int) -> list[int]:
    """As many of ``budget`` tokens as ``sequence`` and its companions can have before their last ones."""
    shares = []
    for member in sequence.members:
        most = NEVER if member.held is None else member.held.due - member.held.computed
        shares.append(min(member.remaining - 1, most, budget))
        budget -= shares[-1]
    return shares
