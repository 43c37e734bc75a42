"""The books of one step while its batch is formed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.serve.batch import Entry
from penstock.serve.sequence import Sequence

if TYPE_CHECKING:
    from penstock.serve.engine import Engine


class StepRoom:
    """Room for one step of ``engine``; see :class:`~penstock.serve.batching.contract.Room`.

    Attributes:
        tokens: of the budget, left.
        entries: what was taken.
        copies: blocks (from, to) to be copied before the step, since a sequence writes to a frozen one.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._pool = engine, engine.pool
        self.tokens = engine.limits.tokens
        self.entries: list[Entry] = []
        self.copies: list[tuple[int, int]] = []
        self._taken: set[int] = set()
        self._preempted = False

    def take(self, sequence: Sequence, most: int | None = None) -> int:
        if id(sequence) in self._taken or self.tokens == 0:
            return 0
        if not sequence.running and (self._preempted or not self._admit(sequence)):
            return 0
        count = min(sequence.remaining, self.tokens if most is None else min(most, self.tokens))
        if not self._reserve(sequence, count):
            return 0
        scored = int(count == sequence.remaining)
        last = min(sequence.computed + count, sequence.prompt - 1)
        rated = max(0, last - sequence.computed) if sequence.rated is not None else 0
        self.entries.append(Entry(sequence, sequence.slot, sequence.computed, count, scored, rated))
        self._taken.add(id(sequence))
        self.tokens -= count
        sequence.computed += count
        sequence.in_flight += scored
        self._engine.commit(sequence)
        return count

    def _admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot and the blocks that hold its prefix, if all of it would fit."""
        pool, length = self._pool, len(sequence.tokens)
        if len(self._engine.running) == self._engine.limits.sequences:
            return False
        # Where the prompt is to be rated, all of it has to be computed.
        prefix = pool.match(sequence.tokens, length - 1 if sequence.rated is None else 0)
        needed = -(-length // pool.block_size) - len(prefix) + pool.idle_among(prefix)
        # A block for each running sequence stays in hand, or the newcomer would soon be thrown out again.
        if needed + len(self._engine.running) > pool.available and self._engine.running:
            return False
        pool.share(prefix)
        sequence.computed = len(prefix) * pool.block_size
        sequence.committed = len(prefix)
        sequence.node = pool.node_of(prefix[-1] if prefix else None)
        if sequence.cached < 0:
            sequence.cached = sequence.computed
            self._engine.cached_tokens += sequence.cached
        self._engine.start(sequence, prefix)
        return True

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Blocks for ``count`` more tokens of a running sequence, at others' expense where there are none."""
        pool, size = self._pool, self._pool.block_size
        missing = -(-(sequence.computed + count) // size) - len(sequence.blocks)
        # After a fork, the first of the new tokens may go to a block that is not this sequence's alone.
        first = sequence.computed // size
        copied = first < len(sequence.blocks) and pool.frozen(sequence.blocks[first])
        while missing + copied > pool.available:
            victim = next(s for s in reversed(self._engine.running) if id(s) not in self._taken)
            self._engine.preempt(victim)
            self._preempted = True
            if victim is sequence:
                return False
            copied = copied and pool.frozen(sequence.blocks[first])
        if copied:
            (fresh,) = pool.take(1)
            self.copies.append((sequence.blocks[first], fresh))
            pool.release([sequence.blocks[first]])
            sequence.blocks[first] = fresh
            self._engine.runner.tables[sequence.slot, first] = fresh
        if missing > 0:
            self._engine.grow(sequence, pool.take(missing))
        return True
