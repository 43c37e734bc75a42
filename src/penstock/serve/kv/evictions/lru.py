"""Least recently used."""

from __future__ import annotations

from collections import OrderedDict

from penstock.policy import policy
from penstock.serve.kv.evictions.contract import Eviction, Example, Order, Tree


class RecentOrder(OrderedDict[int, None]):
    """Blocks in the order in which they became idle."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self._parent = tree.parent

    def add(self, block: int) -> None:
        self[block] = None
        # What leads to a block mostly becomes idle after it. It is idle before where a sequence computed it itself, as
        # another did.
        above = self._parent(block)
        while above is not None and above in self:
            self.move_to_end(above)
            above = self._parent(above)

    remove = OrderedDict.__delitem__

    def take(self) -> int:
        return self.popitem(last=False)[0]


@policy("kv.eviction", "lru")
class LeastRecentlyUsed(Eviction):
    """The block goes that has been idle for the longest time."""

    def start(self, tree: Tree) -> Order:
        return RecentOrder(tree)

    @classmethod
    def example(cls) -> Example:
        """The second text was used last by the fourth, whose own end is a leaf; so the first goes, from its end."""
        texts = [(1, 2), (3, 4), (5,), (3, 4, 6), (7,)]
        return Example(cls(), 5, texts, {(3,), (3, 4), (3, 4, 6), (5,), (7,)})
