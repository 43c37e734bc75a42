"""Least expected cost."""

from __future__ import annotations

from pydantic import Field

from penstock.policy import policy
from penstock.serve.kv.evictions.contract import Eviction, Example, Order, Tree
from penstock.serve.kv.evictions.ranked import Memories, RankedOrder


class ExpectedCostOrder(RankedOrder):
    """Blocks by frequency, evictions or not, times cost."""

    def __init__(self, tree: Tree, even: int, remembered: int) -> None:
        super().__init__(tree, lambda block: self._uses(block) * (1 + tree.depth(block) / even))
        self._memories = Memories(remembered)

    def _uses(self, block: int) -> int:
        return self._tree.uses(block) + self._memories.read(self._tree.name(block))

    def take(self) -> int:
        block = super().take()
        self._memories.write(self._tree.name(block), self._uses(block))
        return block


@policy("kv.eviction", "lec", papers=[275])
class LeastExpectedCost(Eviction):
    """The block goes whose loss is expected to cost least: how often it was used since the engine started, evicted in
    between or not, times what it costs to compute it (LEC).

    From the paper: the frequency of each query is estimated by counting it, also while it is not in the cache, and what
    has the least product of frequency and cost goes, be it what has just come. Ours: blocks of a tree instead of whole
    queries, a leaf before what leads to it, and a cost that grows with the context that a block's tokens look back at.
    Not built: the multiplexer, which sends each query to one of several models.

    Attributes:
        even: blocks of context for which attention to them costs as much as everything else; a model of 8B parameters
            has 24,576 tokens.
        remembered: evicted blocks of which it is known how often they were used.
    """

    even: int = Field(1536, ge=1)
    remembered: int = Field(1 << 17, ge=0)

    def start(self, tree: Tree) -> Order:
        return ExpectedCostOrder(tree, self.even, self.remembered)

    @classmethod
    def example(cls) -> Example:
        """The second text is evicted for the third, and comes back for it. Counted over all time it has come twice
        then, as the first has; when the last text comes, that one has been idle for longer, and goes."""
        texts: list[tuple[int, ...]] = [(1,), (1,), (2,), (3,), (2,), (4,)]
        return Example(cls(), 2, texts, {(2,), (4,)})
