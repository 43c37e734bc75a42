"""Greedy dual size with frequency."""

from __future__ import annotations

from pydantic import Field

from penstock.policy import policy
from penstock.serve.kv.evictions.contract import Eviction, Example, Order, Tree
from penstock.serve.kv.evictions.ranked import RankedOrder


class GreedyDualOrder(RankedOrder):
    """Blocks by frequency times cost, above the level of what was evicted last."""

    def __init__(self, tree: Tree, even: int) -> None:
        super().__init__(tree, lambda block: self._level + tree.uses(block) * (1 + tree.depth(block) / even))
        self._level = 0.0

    def take(self) -> int:
        self._level, block = self.first()
        self.remove(block)
        return block


@policy("kv.eviction", "gdsf", papers=[275])
class GreedyDualSizeFrequency(Eviction):
    """The block goes that is worth least: how often it was used since it is in the tree, times what it costs to compute
    it, plus the worth of the block that was evicted last when this one became idle (GDSF).

    The last term lets what was worth much long ago go in the end. From the paper: caching by GDSF where frequencies are
    not known beforehand. Ours: the entries are blocks of a tree instead of whole queries; all have one size, a leaf
    goes before what leads to it, and the cost is that of a block's tokens, which grows with the context they look back
    at.

    Attributes:
        even: blocks of context for which attention to them costs as much as everything else; a model of 8B parameters
            has 24,576 tokens.
    """

    even: int = Field(1536, ge=1)

    def start(self, tree: Tree) -> Order:
        return GreedyDualOrder(tree, self.even)

    @classmethod
    def example(cls) -> Example:
        """The tokens of the first text, which came three times, are worth 3 and 3 (1 + 1/2), the second text 2, the two
        behind it 1 each. These two go first, which lifts the level to 1: the two that come then are worth 2. So the
        second text, worth 2 for the longest time, goes for the next, and the older of these two for the last."""
        texts: list[tuple[int, ...]] = [(1, 2), (1, 2), (1, 2), (3,), (3,), (4,), (5,), (6,), (7,), (8,), (9,)]
        return Example(cls(even=2), 5, texts, {(1,), (1, 2), (7,), (8,), (9,)})
