"""Marking with predictions of one bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from pydantic import Field

from penstock.core.randomness import numpy_generator
from penstock.policy import policy
from penstock.serve.kv.evictions.contract import Eviction, Example, Order, Tree
from penstock.serve.kv.evictions.ranked import Memories, RankedOrder

#: Classes of blocks, in the order in which they go: predicted to be safe to evict; not used in this phase; the others.
DISCARD, UNMARKED, MARKED = range(3)


class MarkingOrder(RankedOrder):
    """Blocks that are predicted to be safe to evict go first, at random, then those that are not marked, at random.

    Args:
        tree: that the blocks are in.
        discard: whether a block that becomes idle is predicted to be safe to evict.
        draw: of what is random.
    """

    def __init__(self, tree: Tree, discard: Callable[[int], bool], draw: np.random.Generator) -> None:
        super().__init__(tree, self._class_of)
        self._discard, self._draw = discard, draw

    def _class_of(self, block: int) -> tuple[int, float]:
        return DISCARD if self._discard(block) else MARKED, float(self._draw.random())

    def take(self) -> int:
        if self.first()[0][0] == MARKED:
            self.rerank(lambda rank: (min(rank[0], UNMARKED), rank[1]))
        return super().take()


class PredictedOrder(MarkingOrder):
    """The prediction: what was used once alone, as far as is remembered, is not used again."""

    def __init__(self, tree: Tree, remembered: int, draw: np.random.Generator) -> None:
        super().__init__(tree, lambda block: self._uses(block) == 1, draw)
        self._memories = Memories(remembered)

    def _uses(self, block: int) -> int:
        return self._tree.uses(block) + self._memories.read(self._tree.name(block))

    def take(self) -> int:
        block = super().take()
        self._memories.write(self._tree.name(block), self._uses(block))
        return block


@policy("kv.eviction", "succinct", papers=[406])
class SuccinctPredictions(Eviction):
    """A bit for each block says whether it is safe to evict; those go first, at random, then blocks that were not used
    in this phase, at random. A phase ends when all have been used in it.

    From the paper, in our reading: discard predictions of one bit a request, and randomized marking of what is to be
    kept. A bit that wrongly lets a block go costs one miss. Ours: a leaf goes before what leads to it; and the
    prediction, which the paper leaves open: a block is safe to evict until it has been used twice. Not built: phase
    predictions, and the combination with an algorithm without predictions, which bounds what wrong bits cost in all.

    Attributes:
        remembered: evicted blocks of which it is known how often they were used.
        seed: of what is random; the tokens that come out do not depend on it.
    """

    remembered: int = Field(1 << 17, ge=0)
    seed: int = Field(0, ge=0)

    def start(self, tree: Tree) -> Order:
        return PredictedOrder(tree, self.remembered, numpy_generator(self.seed, "kv.eviction"))

    @classmethod
    def example(cls) -> Example:
        """The first text came twice: it is kept, while each of the others, which came once, goes for the next. When the
        second comes back it is remembered, so it counts as used twice; the last one, new, finds both marked, a phase
        ends, and one of the two goes by chance: with the seed 0, the second."""
        return Example(cls(), 2, [(1,), (1,), (2,), (3,), (2,), (4,)], {(1,), (4,)})
