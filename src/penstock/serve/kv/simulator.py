"""The pool without an engine: what a policy finds of a trace of texts, and the most that could be found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from penstock.serve.kv.evictions.contract import Order, Tree
from penstock.serve.kv.evictions.ranked import RankedOrder
from penstock.serve.kv.pool import BlockPool, name_behind

#: Texts, in the order in which they come.
Trace = Sequence[Sequence[int]]


class Found(NamedTuple):
    """Full blocks of a trace's texts that were in the pool, and those that were not."""

    hits: int
    misses: int

    @property
    def rate(self) -> float:
        """The share that was there."""
        return self.hits / max(1, self.hits + self.misses)


class Simulator:
    """Holds one text after the other.

    Args:
        blocks, block_size: of the pool; no text has more blocks.
        start: makes the order of the idle ones, see :meth:`~penstock.serve.kv.evictions.contract.Eviction.start`.

    Attributes:
        pool: the blocks.
        found: so far.
    """

    def __init__(self, blocks: int, block_size: int, start: Callable[[Tree], Order]) -> None:
        self.pool = BlockPool(blocks, block_size, start)
        self.found = Found(0, 0)

    def request(self, text: Sequence[int]) -> None:
        """Looks for the full blocks of ``text``, puts those that are missing into the tree, and lets go of all."""
        pool, size = self.pool, self.pool.block_size
        held = pool.match(text, len(text))
        pool.share(held)
        hits, whole = len(held), len(text) // size
        held += pool.take(whole - hits)
        node = pool.node_of(held[hits - 1] if hits else None)
        for index in range(hits, whole):
            node = pool.commit(node, text[index * size : (index + 1) * size], held[index])
        pool.release(held)
        self.found = Found(self.found.hits + hits, self.found.misses + whole - hits)


def play(trace: Trace, blocks: int, block_size: int, start: Callable[[Tree], Order]) -> Found:
    """What is found of ``trace`` in a pool of so many blocks."""
    simulator = Simulator(blocks, block_size, start)
    for text in trace:
        simulator.request(text)
    return simulator.found


def optimum(trace: Trace, blocks: int, block_size: int) -> Found:
    """The most that any policy finds of ``trace``, which knows what comes: Belady's rule, by which the block goes whose
    next use is farthest. What leads to a block is used whenever the block is, so that this is always a leaf."""
    uses: dict[bytes, list[int]] = defaultdict(list)
    for time, text in enumerate(trace):
        for name in names(text, block_size):
            uses[name].append(time)
    now = 0

    def start(tree: Tree) -> Order:
        return RankedOrder(tree, lambda block: -_after(uses[tree.name(block)], now, len(trace)))

    simulator = Simulator(blocks, block_size, start)
    for now, text in enumerate(trace):  # noqa: B007 - the rule looks at it
        simulator.request(text)
    return simulator.found


def names(text: Sequence[int], block_size: int) -> Iterator[bytes]:
    """Of the full blocks of ``text``, in order."""
    name = b""
    for start in range(0, len(text) - block_size + 1, block_size):
        name = name_behind(name, text[start : start + block_size])
        yield name


def _after(times: list[int], now: int, never: int) -> int:
    """The first of ``times`` behind ``now``; earlier ones are dropped, since time does not go back."""
    while times and times[0] <= now:
        times.pop(0)
    return times[0] if times else never
